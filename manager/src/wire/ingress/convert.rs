//! A trainer's messages as the core's words, checked as far as that needs no state.

use std::sync::Arc;
use std::time::Duration;

use anabranch_proto::limits::MAX_GROUP_SAMPLES;
use anabranch_proto::tokens::{WIDTH, is_column};
use anabranch_proto::{BatchSeq, SessionId, Step, Version, pb};

use super::check::{Invalid, field, name, number, optional_word, word};
use crate::event::{
    Announce, CancelWhat, Convention, NewGroup, OnExceed, OnRunning, OpenJob, Pack, Sampling,
    SenderOf, Shard, Staleness,
};
use crate::wire::agent_link::model;

/// Where the trainer does not say how long it may be away.
const TRAINER_LOST: Duration = Duration::from_secs(600);
const MAX_META_BYTES: usize = 1 << 20;
const MAX_STOP_STRINGS: usize = 64;
const MAX_STOP_STRING_BYTES: usize = 1024;
const MAX_STOP_IDS: usize = 1024;
const MAX_SHARDS: u32 = 65_536;

pub(super) fn open(request: pb::OpenRequest) -> Result<OpenJob, Invalid> {
    name("job", &request.job)?;
    let lost = request.on_trainer_lost_ms;
    let roll = request.roll.unwrap_or_default();
    Ok(OpenJob {
        job: request.job,
        epoch: request.epoch,
        model: model(request.model.unwrap_or_default())?,
        convention: convention(request.convention)?,
        staleness: staleness(request.staleness.unwrap_or_default())?,
        on_running: on_running(request.on_running)?,
        on_trainer_lost: if lost == 0 { TRAINER_LOST } else { millis(lost) },
        resume: request.resume.then_some(BatchSeq(request.cursor)),
        seed: request.seed,
        rolling: roll.rolling.then_some(roll.keep_serving),
    })
}

fn convention(wire: i32) -> Result<Convention, Invalid> {
    match pb::Convention::try_from(wire) {
        Ok(pb::Convention::Raw) => Ok(Convention::Raw),
        Ok(pb::Convention::Tempered | pb::Convention::Unspecified) => Ok(Convention::Tempered),
        Ok(pb::Convention::Processed) => Ok(Convention::Processed),
        Err(_) => {
            Err(field("convention", format!("{wire} is unknown: raw, tempered or processed")))
        }
    }
}

fn staleness(wire: pb::Staleness) -> Result<Staleness, Invalid> {
    use pb::staleness::{Kind, OnExceed as Exceed};
    let max_lag = match Kind::try_from(wire.kind) {
        Ok(Kind::Unspecified | Kind::OnPolicy) => Some(0),
        Ok(Kind::Bounded) => Some(wire.max_lag.into()),
        Ok(Kind::Unbounded) => None,
        Err(_) => return Err(field("staleness.kind", format!("{} is unknown", wire.kind))),
    };
    let on_exceed = match Exceed::try_from(wire.on_exceed) {
        Ok(Exceed::Unspecified | Exceed::Wait) => OnExceed::Wait,
        Ok(Exceed::Restart) => OnExceed::Restart,
        Ok(Exceed::Drop) => OnExceed::Drop,
        Err(_) => {
            return Err(field("staleness.on_exceed", format!("{} is unknown", wire.on_exceed)));
        }
    };
    Ok(Staleness { max_lag, on_exceed })
}

fn on_running(wire: i32) -> Result<OnRunning, Invalid> {
    match pb::OnRunning::try_from(wire) {
        Ok(pb::OnRunning::Unspecified | pb::OnRunning::Continue) => Ok(OnRunning::Continue),
        Ok(pb::OnRunning::Finish) => Ok(OnRunning::Finish),
        Ok(pb::OnRunning::Abort) => Ok(OnRunning::Abort),
        Err(_) => Err(field("on_running", format!("{wire} is unknown: finish, continue or abort"))),
    }
}

/// All groups or none: a fault in one is told before anything is taken.
pub(super) fn groups(groups: Vec<pb::Group>) -> Result<Vec<NewGroup>, Invalid> {
    let one = |(at, wire): (usize, pb::Group)| {
        let place = format!("group {at} (key {:?})", wire.key.chars().take(60).collect::<String>());
        group(wire).map_err(|invalid| invalid.inside(&place))
    };
    groups.into_iter().enumerate().map(one).collect()
}

fn group(wire: pb::Group) -> Result<NewGroup, Invalid> {
    word("key", &wire.key)?;
    prompt(&wire.prompt)?;
    if !(1..=MAX_GROUP_SAMPLES).contains(&wire.n) {
        return Err(field("n", format!("{} is not between 1 and {MAX_GROUP_SAMPLES}", wire.n)));
    }
    optional_word("session", &wire.session)?;
    if wire.meta.len() > MAX_META_BYTES {
        let what = format!("{} bytes, at most {MAX_META_BYTES} are allowed", wire.meta.len());
        return Err(field("meta", what));
    }
    let sampling =
        wire.sampling.ok_or_else(|| field("sampling", "missing; max_tokens is required"))?;
    Ok(NewGroup {
        key: wire.key,
        prompt: wire.prompt,
        n: wire.n,
        sampling: Arc::new(self::sampling(sampling).map_err(|invalid| invalid.inside("sampling"))?),
        pin: wire.pin.map(|pin| version("pin", pin)).transpose()?,
        priority: wire.priority,
        deadline: (wire.deadline_ms > 0).then(|| millis(wire.deadline_ms)),
        meta: wire.meta,
        session: wire.session,
    })
}

fn prompt(column: &[u8]) -> Result<(), Invalid> {
    if column.is_empty() {
        return Err(field("prompt", "empty; a prompt has at least one token"));
    }
    if !is_column(column) {
        let what = format!("{} bytes are not whole token ids of {WIDTH} bytes", column.len());
        return Err(field("prompt", what));
    }
    Ok(())
}

fn sampling(wire: pb::Sampling) -> Result<Sampling, Invalid> {
    if wire.max_tokens == 0 {
        return Err(field("max_tokens", "must be at least 1"));
    }
    if wire.min_tokens > wire.max_tokens {
        let what = format!("{} is above max_tokens, {}", wire.min_tokens, wire.max_tokens);
        return Err(field("min_tokens", what));
    }
    stops(&wire)?;
    let top_p = number("top_p", wire.top_p.unwrap_or(1.0), 0.0..=1.0)?;
    if top_p == 0.0 {
        return Err(field("top_p", "must be above 0: it would leave no token"));
    }
    let repetition_penalty =
        number("repetition_penalty", wire.repetition_penalty.unwrap_or(1.0), 0.01..=100.0)?;
    Ok(Sampling {
        max_tokens: wire.max_tokens,
        min_tokens: wire.min_tokens,
        temperature: number("temperature", wire.temperature.unwrap_or(1.0), 0.0..=100.0)?,
        top_p,
        top_k: wire.top_k,
        min_p: number("min_p", wire.min_p, 0.0..=1.0)?,
        stop_ids: wire.stop_ids,
        stop_strings: wire.stop_strings,
        ignore_eos: wire.ignore_eos,
        presence_penalty: number("presence_penalty", wire.presence_penalty, -2.0..=2.0)?,
        frequency_penalty: number("frequency_penalty", wire.frequency_penalty, -2.0..=2.0)?,
        repetition_penalty,
        seed: wire.seed,
        restart_ok: restart_ok(wire.replay)?,
        extra: wire.extra.into_iter().collect(),
    })
}

fn stops(wire: &pb::Sampling) -> Result<(), Invalid> {
    if wire.stop_ids.len() > MAX_STOP_IDS {
        let what = format!("{}, at most {MAX_STOP_IDS} are allowed", wire.stop_ids.len());
        return Err(field("stop_ids", what));
    }
    if wire.stop_strings.len() > MAX_STOP_STRINGS {
        let what = format!("{}, at most {MAX_STOP_STRINGS} are allowed", wire.stop_strings.len());
        return Err(field("stop_strings", what));
    }
    let odd = |text: &&String| !(1..=MAX_STOP_STRING_BYTES).contains(&text.len());
    match wire.stop_strings.iter().find(odd) {
        Some(text) => {
            let what =
                format!("one has {} bytes; 1 to {MAX_STOP_STRING_BYTES} are allowed", text.len());
            Err(field("stop_strings", what))
        }
        None => Ok(()),
    }
}

fn restart_ok(wire: i32) -> Result<bool, Invalid> {
    match pb::Replay::try_from(wire) {
        Ok(pb::Replay::Unspecified | pb::Replay::Strict) => Ok(false),
        Ok(pb::Replay::RestartOk) => Ok(true),
        Err(_) => Err(field("replay", format!("{wire} is unknown: strict or restart_ok"))),
    }
}

pub(super) fn cancel(request: pb::CancelRequest) -> Result<CancelWhat, Invalid> {
    let pb::CancelRequest { keys, step, all, .. } = request;
    match (keys.is_empty(), step, all) {
        (false, None, false) => Ok(CancelWhat::Keys(keys)),
        (true, Some(step), false) => Ok(CancelWhat::Step(Step(step))),
        (true, None, true) => Ok(CancelWhat::All),
        _ => Err(field("cancel", "name exactly one of keys, step or all")),
    }
}

pub(super) fn pack(wire: Option<pb::Pack>) -> Result<Pack, Invalid> {
    let wire = wire.unwrap_or_default();
    Ok(Pack {
        min: wire.min.max(1),
        multiple_of: wire.multiple_of.max(1),
        whole_groups: wire.whole_groups,
        max_wait: (wire.max_wait_ms > 0).then(|| millis(wire.max_wait_ms)),
    })
}

pub(super) fn shard(index: u32, count: u32) -> Result<Shard, Invalid> {
    let count = count.max(1);
    if count > MAX_SHARDS || index >= count {
        let what =
            format!("{index} of {count}: the index starts at 0, at most {MAX_SHARDS} shards");
        return Err(field("shard_index", what));
    }
    Ok(Shard { index, count })
}

pub(super) fn announce(
    begin: pb::publish_part::Begin,
    session: SessionId,
) -> Result<Announce, Invalid> {
    if begin.kind > 1 || begin.base.is_some() {
        let what =
            "this manager takes full versions only (kind 1): deltas and adapters are not supported";
        return Err(field("begin.kind", what));
    }
    let version = begin.version.ok_or_else(|| field("begin.version", "missing"))?;
    let version = self::version("begin.version", version)?;
    if version.is_base() {
        return Err(field("begin.version.number", "0 is what engines start with; publish from 1"));
    }
    let directory = Some(begin.directory).filter(|directory| !directory.is_empty());
    match &directory {
        None if begin.addresses.is_empty() && !begin.dials => {
            return Err(field(
                "begin.addresses",
                "nobody could fetch it: give addresses, say that the trainer dials, or give a directory",
            ));
        }
        Some(path) if !path.starts_with('/') => {
            return Err(field("begin.directory", format!("{path:?} is not an absolute path")));
        }
        _ => super::check::words("begin.addresses", &begin.addresses)?,
    }
    let sender = begin.sender.map(|of| sender(of, directory.is_some())).transpose()?;
    let (addresses, dials, bytes) = (begin.addresses, begin.dials, begin.bytes);
    Ok(Announce { session, version, addresses, dials, bytes, directory, sender })
}

/// More senders than this are a mistake.
const MOST_SENDERS: u32 = 1024;

fn sender(of: pb::publish_part::Sender, in_place: bool) -> Result<SenderOf, Invalid> {
    let pb::publish_part::Sender { index, count, part } = of;
    if index >= count || count > MOST_SENDERS {
        let what = format!("number {index} (from 0) of {count}; at most {MOST_SENDERS}");
        return Err(field("begin.sender", what));
    }
    if in_place {
        return Err(field("begin.sender", "a directory that is loaded in place has one publisher"));
    }
    Ok(SenderOf { index, count, part })
}

pub(super) fn version(at: &str, wire: pb::Version) -> Result<Version, Invalid> {
    Version::try_from(wire).map_err(|error| field(at, error))
}

pub(super) fn millis(ms: u32) -> Duration {
    Duration::from_millis(ms.into())
}

#[cfg(test)]
mod tests;
