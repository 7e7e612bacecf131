//! Actions of the core as messages to an agent.

use std::sync::atomic::Ordering;
use std::time::Duration;

use anabranch_proto::grant::{Grant, Role};
use anabranch_proto::limits::FRAME_BYTES;
use anabranch_proto::tokens::WIDTH;
use anabranch_proto::{OrderId, SessionId, pb};
use bytes::Bytes;

use super::sessions::Live;
use super::{Effects, Overflow};
use crate::action::{DialOrder, LoadOrder, ModeKind, StartOrder};
use crate::event::{self, Convention, Held, LinkId, OnRunning, ProbeResult, Sampling, Verdict};
use crate::ledger::Begun;

/// Holders count it from a grant's first use; a fetch that takes longer asks again.
const GRANT_TTL: Duration = Duration::from_secs(3600);

impl Effects {
    pub(super) fn start(&mut self, order: &StartOrder) {
        let kept = match self.ledger.begin(order.sample, order.attempt, order.maker.clone()) {
            Begun::Kept(kept) => kept,
            Begun::AlreadyFinished => return,
            Begun::Unknown => {
                tracing::error!(sample = %order.sample, "start of a sample without a page; not sent");
                return;
            }
        };
        let Some(live) = self.live(order.session) else { return };
        let link = live.link;
        if send_start(live, order, kept).is_err() {
            self.overflowed(link);
        }
    }
}

/// The prompt first, if this link has not carried it yet.
fn send_start(live: &mut Live, order: &StartOrder, kept: Bytes) -> Result<(), Overflow> {
    if live.prompts.insert(order.prompt_digest) {
        for part in prompt_parts(order.prompt_digest, &order.prompt) {
            live.send(pb::data_to_agent::Kind::Prompt(part))?;
        }
    }
    live.send(pb::data_to_agent::Kind::Start(start(order, kept)))
}

/// Frames of a prompt; they share its bytes.
fn prompt_parts(digest: u64, prompt: &Bytes) -> impl Iterator<Item = pb::PromptPart> + '_ {
    const FRAME: usize = FRAME_BYTES / WIDTH * WIDTH;
    (0..prompt.len().max(1)).step_by(FRAME).map(move |at| {
        let to = prompt.len().min(at + FRAME);
        let ids = prompt.slice(at..to);
        pb::PromptPart { digest, at: (at / WIDTH) as u32, ids, last: to == prompt.len() }
    })
}

fn start(order: &StartOrder, kept: Bytes) -> pb::Start {
    let offset = (kept.len() / WIDTH) as u32;
    pb::Start {
        sample: Some(order.sample.into()),
        attempt: order.attempt.0,
        prompt: order.prompt_digest,
        kept,
        sampling: Some(remaining(&order.sampling, offset, order.seed)),
        offset,
        min_version: Some(order.min_version.into()),
        max_version: order.max_version.map(Into::into),
        adapter: String::new(),
        session: order.conversation.clone(),
        seed: order.seed,
        stop_ids: order.stop_ids.to_vec(),
    }
}

/// What is left to make after `offset` kept tokens.
fn remaining(sampling: &Sampling, offset: u32, seed: u64) -> pb::Sampling {
    pb::Sampling {
        max_tokens: sampling.max_tokens.saturating_sub(offset),
        min_tokens: sampling.min_tokens.saturating_sub(offset),
        temperature: Some(sampling.temperature),
        top_p: Some(sampling.top_p),
        top_k: sampling.top_k,
        min_p: sampling.min_p,
        stop_ids: sampling.stop_ids.clone(),
        stop_strings: sampling.stop_strings.clone(),
        ignore_eos: sampling.ignore_eos,
        presence_penalty: sampling.presence_penalty,
        frequency_penalty: sampling.frequency_penalty,
        repetition_penalty: Some(sampling.repetition_penalty),
        seed: Some(seed),
        replay: if sampling.restart_ok { pb::Replay::RestartOk } else { pb::Replay::Strict }.into(),
        extra: sampling.extra.clone().into_iter().collect(),
    }
}

pub(super) fn welcome(
    effects: &Effects,
    (link, session): (LinkId, SessionId),
    lease: Duration,
    (keep, drop): (&[Held], &[Held]),
    serve_key: [u8; 32],
) -> pb::Welcome {
    let known = effects.sessions.get(&session);
    let (job, convention) = effects.job.clone().unzip();
    let oldest = *anabranch_proto::protocol::SUPPORTED.start();
    let proto = effects.links.get(&link).map_or(oldest, |link| link.proto);
    pb::Welcome {
        proto,
        session: effects.life.mark(session),
        manager_epoch: effects.life.epoch,
        lease_ms: ms(lease),
        tick_ms: ms(effects.tick),
        keep: keep.iter().map(held).collect(),
        drop: drop.iter().map(held).collect(),
        acked_tick: known.map_or(0, |session| session.tally.acked_tick.load(Ordering::Acquire)),
        serve_key: Bytes::copy_from_slice(&serve_key),
        job: job.unwrap_or_default(),
        convention: convention.map_or(pb::Convention::Unspecified, wire_convention).into(),
    }
}

pub(super) fn refused(why: String, retry_after: Option<Duration>) -> pb::Refused {
    let retry_after_ms = retry_after.map_or(0, ms);
    pb::Refused { why, retry: retry_after.is_some(), retry_after_ms }
}

pub(super) fn load(order: LoadOrder) -> pb::Load {
    let on_running = match order.on_running {
        OnRunning::Finish => pb::OnRunning::Finish,
        OnRunning::Continue => pb::OnRunning::Continue,
        OnRunning::Abort => pb::OnRunning::Abort,
    };
    pb::Load {
        order: order.order.0,
        version: Some(order.version.into()),
        sources: sources(&order),
        on_running: on_running.into(),
        deadline_ms: ms(order.deadline),
        bytes: order.bytes,
        directory: order.directory.unwrap_or_default(),
        reference: order.reference.map(probe),
        cancel: false,
        stripe_count: order.stripe_count,
        streams: order.streams,
    }
}

/// Each address of each holder, with the permission to fetch there.
fn sources(order: &LoadOrder) -> Vec<pb::Source> {
    let one = |holder: &crate::action::Holder| {
        let grant = Grant {
            job: order.job.clone(),
            version: order.version,
            receiver: order.receiver.to_string(),
            role: Role::Fetch,
            ttl_ms: GRANT_TTL.as_millis() as u64,
            nonce: order.order.0,
        };
        let grant = grant.mint(&holder.serve_key);
        let dial = if holder.dials { pb::source::Dial::Source } else { pb::source::Dial::Receiver };
        let source = |addr: &String| pb::Source {
            addr: addr.clone(),
            dial: dial.into(),
            grant: grant.clone(),
            holder: holder.name.clone(),
            stripes: holder.stripes.clone(),
            fallback_for: holder.fallback_for.clone(),
            origin: holder.origin.clone(),
        };
        match holder.dials {
            true => vec![source(&String::new())],
            false => holder.addresses.iter().map(source).collect::<Vec<_>>(),
        }
    };
    order.sources.iter().flat_map(one).collect()
}

pub(super) fn dial(order: DialOrder) -> pb::publish_event::DialReceiver {
    let grant = Grant {
        job: order.job,
        version: order.version,
        receiver: order.source,
        role: Role::Feed,
        ttl_ms: GRANT_TTL.as_millis() as u64,
        nonce: order.nonce.0,
    };
    pb::publish_event::DialReceiver {
        receiver: order.receiver.to_string(),
        addresses: order.addresses,
        grant: grant.mint(&order.serve_key),
        streams: order.streams,
    }
}

pub(super) fn mode(order: OrderId, mode: ModeKind, deadline: Duration, why: String) -> pb::Mode {
    use pb::mode::Kind;
    let kind = match mode {
        ModeKind::Drain => Kind::Drain,
        ModeKind::ReleaseMemory => Kind::ReleaseMemory,
        ModeKind::ResumeMemory => Kind::ResumeMemory,
        ModeKind::Leave => Kind::Leave,
    };
    pb::Mode { order: order.0, kind: kind.into(), deadline_ms: ms(deadline), why }
}

fn probe(result: ProbeResult) -> pb::Probe {
    let verdict = match result.verdict {
        Verdict::Agrees => pb::probe::Verdict::Agrees,
        Verdict::First => pb::probe::Verdict::First,
        Verdict::Inconclusive => pb::probe::Verdict::Inconclusive,
        Verdict::Disagrees => pb::probe::Verdict::Disagrees,
    };
    pb::Probe { ids: result.ids, logprobs: result.logprobs, verdict: verdict.into() }
}

fn held(held: &event::Held) -> pb::Held {
    pb::Held { sample: Some(held.sample.into()), attempt: held.attempt.0, upto: held.upto }
}

fn wire_convention(convention: Convention) -> pb::Convention {
    match convention {
        Convention::Raw => pb::Convention::Raw,
        Convention::Tempered => pb::Convention::Tempered,
        Convention::Processed => pb::Convention::Processed,
    }
}

pub(crate) fn ms(duration: Duration) -> u32 {
    u32::try_from(duration.as_millis()).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prompt_goes_in_frames_that_tile_it() {
        let prompt: Bytes = vec![7; FRAME_BYTES * 2 + 8].into();
        let parts: Vec<pb::PromptPart> = prompt_parts(1, &prompt).collect();
        let ends: Vec<(u32, usize, bool)> =
            parts.iter().map(|part| (part.at, part.ids.len(), part.last)).collect();
        let frame = FRAME_BYTES as u32 / 4;
        assert_eq!(
            ends,
            [(0, FRAME_BYTES, false), (frame, FRAME_BYTES, false), (2 * frame, 8, true),]
        );
        let exact: Bytes = vec![7; FRAME_BYTES].into();
        assert_eq!(prompt_parts(1, &exact).map(|part| part.last).collect::<Vec<_>>(), [true]);
    }
}
