//! A trainer's messages as the core's words, checked as far as that needs no state.

use std::sync::Arc;
use std::time::Duration;

use anabranch_proto::limits::{check_group_samples, check_meta, check_prompt};
use anabranch_proto::millis::optional;
use anabranch_proto::word::{check_name, check_optional_word, check_word, check_words};
use anabranch_proto::{
    BatchSeq, Invalid, LogprobsMode, Model, OnRunning, Roll, Sampling, SenderOf, SessionId,
    Staleness, Step, Version, pb,
};

use crate::event::{Announce, CancelWhat, NewGroup, OpenJob};

/// Time that a trainer may be away, unless it says otherwise.
const TRAINER_LOST: Duration = Duration::from_secs(600);

pub(super) fn open(request: pb::OpenRequest) -> Result<OpenJob, Invalid> {
    check_name("job", &request.job)?;
    let roll = Roll::from(request.roll.unwrap_or_default());
    let logprobs_mode = LogprobsMode::from_wire("convention", request.convention)?;
    let on_running = OnRunning::from_wire("on_running", request.on_running)?;
    Ok(OpenJob {
        job: request.job,
        epoch: request.epoch,
        model: Model::try_from(request.model.unwrap_or_default())?,
        logprobs_mode: logprobs_mode.unwrap_or_default(),
        staleness: Staleness::try_from(request.staleness.unwrap_or_default())?,
        on_running: on_running.unwrap_or_default(),
        on_trainer_lost: optional(request.on_trainer_lost_ms).unwrap_or(TRAINER_LOST),
        resume: request.resume.then_some(BatchSeq(request.cursor)),
        seed: request.seed,
        rolling: roll.keep_serving(),
        join: request.join,
    })
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
    check_word("key", &wire.key)?;
    check_prompt(&wire.prompt)?;
    check_group_samples(wire.n)?;
    check_optional_word("session", &wire.session)?;
    check_meta(wire.meta.len())?;
    let missing = || Invalid::missing("sampling", "max_tokens is required");
    let sampling = Sampling::try_from(wire.sampling.ok_or_else(missing)?);
    Ok(NewGroup {
        key: wire.key,
        prompt: wire.prompt,
        n: wire.n,
        sampling: Arc::new(sampling.map_err(|invalid| invalid.inside("sampling"))?),
        pin: wire.pin.map(|pin| Version::read("pin", pin)).transpose()?,
        priority: wire.priority,
        deadline: optional(wire.deadline_ms),
        meta: wire.meta,
        session: wire.session,
    })
}

pub(super) fn cancel(request: pb::CancelRequest) -> Result<CancelWhat, Invalid> {
    let pb::CancelRequest { keys, step, all, .. } = request;
    match (keys.is_empty(), step, all) {
        (false, None, false) => Ok(CancelWhat::Keys(keys)),
        (true, Some(step), false) => Ok(CancelWhat::Step(Step(step))),
        (true, None, true) => Ok(CancelWhat::All),
        _ => Err(Invalid::rule("cancel", "name exactly one of keys, step or all")),
    }
}

pub(super) fn announce(
    begin: pb::publish_part::Begin,
    session: SessionId,
) -> Result<Announce, Invalid> {
    if begin.kind > 1 || begin.base.is_some() {
        let what =
            "this manager takes full versions only (kind 1): deltas and adapters are not supported";
        return Err(Invalid::rule("begin.kind", what));
    }
    let version = Version::required("begin.version", begin.version)?;
    if version.is_base() {
        return Err(Invalid::rule(
            "begin.version.number",
            "0 is what engines start with; publish from 1",
        ));
    }
    let directory = Some(begin.directory).filter(|directory| !directory.is_empty());
    match &directory {
        None if begin.addresses.is_empty() && !begin.dials => {
            return Err(Invalid::rule(
                "begin.addresses",
                "nobody could fetch it: give addresses, say that the trainer dials, or give a directory",
            ));
        }
        Some(path) if !path.starts_with('/') => {
            return Err(Invalid::rule(
                "begin.directory",
                format!("{path:?} is not an absolute path"),
            ));
        }
        _ => check_words("begin.addresses", &begin.addresses)?,
    }
    let sender = begin.sender.map(|of| sender(of, directory.is_some())).transpose()?;
    let (addresses, dials, bytes) = (begin.addresses, begin.dials, begin.bytes);
    Ok(Announce { session, version, addresses, dials, bytes, directory, sender })
}

fn sender(of: pb::publish_part::Sender, in_place: bool) -> Result<SenderOf, Invalid> {
    if in_place {
        let what = "a directory that is loaded in place has one publisher";
        return Err(Invalid::rule("begin.sender", what));
    }
    SenderOf::try_from(of)
}

#[cfg(test)]
mod tests;
