//! Actions of the core as messages to an agent.

use std::sync::atomic::Ordering;
use std::time::Duration;

use anabranch_proto::grant::{Grant, Role};
use anabranch_proto::limits::FRAME_BYTES;
use anabranch_proto::millis::millis;
use anabranch_proto::tokens::WIDTH;
use anabranch_proto::{Held, OrderId, Sampling, SessionId, pb};
use bytes::Bytes;

use super::Effects;
use crate::action::{DialOrder, LoadOrder, ModeKind, StartOrder};
use crate::event::LinkId;
use crate::ledger::Begun;
use crate::wire::streams::Overflow;
use crate::wire::streams::sessions::Live;

/// Holders count it from a grant's first use; a fetch that takes longer asks again.
const GRANT_TTL: Duration = Duration::from_secs(3600);

impl Effects {
    pub(super) fn start(&mut self, order: &StartOrder) {
        let kept = match self.ledger.begin(
            self.clock.now(),
            order.sample,
            order.attempt,
            order.maker.clone(),
        ) {
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

/// Settings for the tokens after `offset` kept ones. Engines are told the repetition penalty even when it
/// is off.
fn remaining(sampling: &Sampling, offset: u32, seed: u64) -> pb::Sampling {
    let rest = Sampling {
        max_tokens: sampling.max_tokens.saturating_sub(offset),
        min_tokens: sampling.min_tokens.saturating_sub(offset),
        seed: Some(seed),
        ..sampling.clone()
    };
    let repetition_penalty = Some(rest.repetition_penalty);
    pb::Sampling { repetition_penalty, ..rest.into() }
}

pub(super) fn welcome(
    effects: &Effects,
    (link, session): (LinkId, SessionId),
    lease: Duration,
    (keep, drop): (&[Held], &[Held]),
    serve_key: [u8; 32],
) -> pb::Welcome {
    let known = effects.sessions.get(&session);
    let (job, logprobs_mode) = effects.job.clone().unzip();
    let oldest = *anabranch_proto::protocol::SUPPORTED.start();
    let proto = effects.links.get(&link).map_or(oldest, |link| link.proto);
    pb::Welcome {
        proto,
        session: effects.life.mark(session),
        manager_epoch: effects.life.epoch,
        lease_ms: millis(lease),
        tick_ms: millis(effects.tick),
        keep: keep.iter().copied().map(Into::into).collect(),
        drop: drop.iter().copied().map(Into::into).collect(),
        acked_tick: known.map_or(0, |session| session.tally.acked_tick.load(Ordering::Acquire)),
        serve_key: Bytes::copy_from_slice(&serve_key),
        job: job.unwrap_or_default(),
        convention: logprobs_mode.map_or(pb::Convention::Unspecified, Into::into).into(),
    }
}

pub(super) fn refused(why: String, retry_after: Option<Duration>) -> pb::Refused {
    let retry_after_ms = retry_after.map_or(0, millis);
    pb::Refused { why, retry: retry_after.is_some(), retry_after_ms }
}

pub(super) fn load(order: LoadOrder) -> pb::Load {
    pb::Load {
        order: order.order.0,
        version: Some(order.version.into()),
        sources: sources(&order),
        on_running: pb::OnRunning::from(order.on_running).into(),
        deadline_ms: millis(order.deadline),
        bytes: order.bytes,
        directory: order.directory.unwrap_or_default(),
        reference: order.reference.map(Into::into),
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
    pb::Mode { order: order.0, kind: kind.into(), deadline_ms: millis(deadline), why }
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
