//! Ticks of one session: columns of generated tokens, kept until the manager acknowledged them.
//! Pure and hot: every chunk of every sample passes `append`. Decides nothing about samples.
//!
//! ```text
//!   append, end ──► open tick ── seal ──► unsent ── next_to_send ──► in flight ── ack ──► gone
//!                                           ▲                           │
//!                                           └──────── resend_after ─────┘   (re-attach)
//! ```

use std::collections::VecDeque;

use anabranch_proto::limits::FRAME_BYTES;
use anabranch_proto::tokens::WIDTH;
use anabranch_proto::{Attempt, SampleId, Version, pb};
use anabranch_runtime::Now;
use bytes::{BufMut, BytesMut};

/// Tokens and ends on their way to the manager.
pub struct Outbox {
    open: Open,
    /// Sealed ticks that are not acknowledged, by ascending seq without gaps.
    sealed: VecDeque<Sealed>,
    /// Number of ticks of `sealed`, from the front, that were sent.
    in_flight: usize,
    next_seq: u64,
    /// Size of `sealed`, in bytes.
    sealed_bytes: usize,
}

/// Description of consecutive tokens of one attempt under one version.
#[derive(Clone, Copy, Debug)]
pub struct Segment {
    pub sample: SampleId,
    pub attempt: Attempt,
    /// Position of the first token within the sample.
    pub offset: u32,
    pub version: Version,
    /// True if a version boundary lies inside and its position is unknown.
    pub inexact: bool,
}

#[derive(Default)]
struct Open {
    segs: Vec<pb::Seg>,
    versions: Vec<Version>,
    tokens: BytesMut,
    logprobs: BytesMut,
    ends: Vec<pb::End>,
    /// Time of the first entry; `None` while the tick is empty.
    since: Option<Now>,
}

struct Sealed {
    tick: pb::Tick,
    since: Now,
    bytes: usize,
}

// === impl Outbox ===

impl Outbox {
    /// An empty outbox whose first tick has seq 1.
    pub fn new() -> Outbox {
        Outbox {
            open: Open::default(),
            sealed: VecDeque::new(),
            in_flight: 0,
            next_seq: 1,
            sealed_bytes: 0,
        }
    }

    /// Adds the tokens of `segment` to the open tick. `tokens` and `logprobs` are equally long.
    pub fn append(&mut self, now: Now, segment: &Segment, tokens: &[u32], logprobs: &[f32]) {
        debug_assert_eq!(tokens.len(), logprobs.len());
        if tokens.is_empty() {
            return;
        }
        if self.open.bytes() >= TICK_BYTES {
            self.seal();
        }
        self.open.append(now, segment, tokens, logprobs);
    }

    /// Adds the end of an attempt to the open tick.
    pub fn end(&mut self, now: Now, end: pb::End) {
        self.open.since.get_or_insert(now);
        self.open.ends.push(end);
    }

    /// Takes the ends of lost samples back out of the open tick.
    pub fn take_lost_ends(&mut self) -> Vec<pb::End> {
        let is_lost = |end: &mut pb::End| end.why() == pb::end::Why::Lost;
        self.open.ends.extract_if(.., is_lost).collect()
    }

    /// Closes the open tick, unless the tick is empty.
    pub fn seal(&mut self) {
        let Some(since) = self.open.since.take() else { return };
        let bytes = self.open.bytes();
        let tick = self.open.take(self.next_seq);
        self.next_seq += 1;
        self.sealed_bytes += bytes;
        self.sealed.push_back(Sealed { tick, since, bytes });
    }

    /// The next tick to send; `None` while a whole window is unacknowledged.
    pub fn next_to_send(&mut self, now: Now) -> Option<pb::Tick> {
        if self.in_flight >= WINDOW_TICKS {
            return None;
        }
        let sealed = self.sealed.get(self.in_flight)?;
        self.in_flight += 1;
        let held = now.since(sealed.since).as_millis();
        let held_ms = u32::try_from(held).unwrap_or(u32::MAX);
        Some(pb::Tick { held_ms, ..sealed.tick.clone() })
    }

    /// Notes that the manager has every tick up to `seq`. False if no such tick was ever sent.
    pub fn ack(&mut self, seq: u64) -> bool {
        if seq >= self.next_seq {
            return false;
        }
        while self.sealed.front().is_some_and(|front| front.tick.seq <= seq) {
            let gone = self.sealed.pop_front().expect("just looked at");
            self.sealed_bytes -= gone.bytes;
            self.in_flight = self.in_flight.saturating_sub(1);
        }
        true
    }

    /// Marks every unacknowledged tick as unsent: after a new link, ticks in flight may be lost.
    pub fn resend_all(&mut self) {
        self.in_flight = 0;
    }

    /// Drops everything: ticks of an old session do not count in a new one.
    pub fn clear(&mut self) {
        *self = Outbox::new();
    }

    /// Number of unacknowledged bytes, including those of the open tick.
    pub fn bytes(&self) -> usize {
        self.sealed_bytes + self.open.bytes()
    }

    /// True if nothing is open and everything is acknowledged.
    pub fn is_empty(&self) -> bool {
        self.sealed.is_empty() && self.open.since.is_none()
    }

    /// True if the open tick has an entry.
    pub fn has_open(&self) -> bool {
        self.open.since.is_some()
    }

    /// Ends that the manager has not acknowledged.
    pub fn ends(&self) -> impl Iterator<Item = &pb::End> {
        self.sealed.iter().flat_map(|sealed| &sealed.tick.ends).chain(&self.open.ends)
    }
}

/// Size at which a tick is closed, so that the tick with what is appended last fits a frame.
const TICK_BYTES: usize = FRAME_BYTES * 3 / 4;

/// Most ticks in flight: 2.5 s of 20 ms ticks, above any sane round trip. The driver's channel is
/// larger, so that sending never waits.
pub const WINDOW_TICKS: usize = 128;

/// Approximate size of one segment in a message, in bytes.
const SEG_BYTES: usize = 32;
/// Approximate size of one end in a message, in bytes.
const END_BYTES: usize = 48;

// === impl Open ===

impl Open {
    fn append(&mut self, now: Now, segment: &Segment, tokens: &[u32], logprobs: &[f32]) {
        self.since.get_or_insert(now);
        let version_ix = self.version_ix(segment.version);
        let count = u32::try_from(tokens.len()).expect("a chunk has fewer than 2^32 tokens");
        match self.segs.last_mut() {
            Some(last) if continues(last, segment, version_ix) => last.count += count,
            _ => self.segs.push(pb::Seg {
                group: segment.sample.group.0,
                index: segment.sample.index,
                attempt: segment.attempt.0,
                offset: segment.offset,
                count,
                version_ix,
                inexact: segment.inexact,
                kv_stale: false,
            }),
        }
        self.tokens.reserve(tokens.len() * WIDTH);
        self.logprobs.reserve(tokens.len() * WIDTH);
        for token in tokens {
            self.tokens.put_u32_le(*token);
        }
        for logprob in logprobs {
            self.logprobs.put_f32_le(*logprob);
        }
    }

    /// Index of `version` in the tick's table, searched from the newest: few versions are alive at
    /// once.
    fn version_ix(&mut self, version: Version) -> u32 {
        let found = self.versions.iter().rposition(|known| *known == version);
        let index = found.unwrap_or_else(|| {
            self.versions.push(version);
            self.versions.len() - 1
        });
        u32::try_from(index).expect("a tick has few versions")
    }

    fn bytes(&self) -> usize {
        self.tokens.len() * 2 + self.segs.len() * SEG_BYTES + self.ends.len() * END_BYTES
    }

    fn take(&mut self, seq: u64) -> pb::Tick {
        pb::Tick {
            seq,
            segs: std::mem::take(&mut self.segs),
            tokens: self.tokens.split().freeze(),
            logprobs: self.logprobs.split().freeze(),
            columns: Vec::new(),
            versions: self.versions.drain(..).map(pb::Version::from).collect(),
            ends: std::mem::take(&mut self.ends),
            held_ms: 0,
        }
    }
}

/// True if `segment` extends the last segment of the tick.
fn continues(last: &pb::Seg, segment: &Segment, version_ix: u32) -> bool {
    (last.group, last.index, last.attempt)
        == (segment.sample.group.0, segment.sample.index, segment.attempt.0)
        && last.offset + last.count == segment.offset
        && (last.version_ix, last.inexact) == (version_ix, segment.inexact)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segment(index: u32, offset: u32, number: u64) -> Segment {
        Segment {
            sample: SampleId::new(1, index),
            attempt: Attempt(1),
            offset,
            version: Version { number, ..Version::base(0) },
            inexact: false,
        }
    }

    fn send_all(outbox: &mut Outbox) -> Vec<u64> {
        std::iter::from_fn(|| outbox.next_to_send(Now::ZERO)).map(|tick| tick.seq).collect()
    }

    #[test]
    fn a_tick_joins_what_follows_on_and_parts_what_does_not() {
        let mut outbox = Outbox::new();
        outbox.append(Now::ZERO, &segment(0, 0, 1), &[1, 2], &[0.1, 0.2]);
        outbox.append(Now::ZERO, &segment(0, 2, 1), &[3], &[0.3]);
        outbox.append(Now::ZERO, &segment(1, 0, 1), &[4], &[0.4]);
        outbox.append(Now::ZERO, &segment(1, 1, 2), &[5], &[0.5]);
        outbox.seal();
        let tick = outbox.next_to_send(Now::from_millis(7)).expect("sealed");
        let segs: Vec<_> =
            tick.segs.iter().map(|s| (s.index, s.offset, s.count, s.version_ix)).collect();
        assert_eq!(segs, [(0, 0, 3, 0), (1, 0, 1, 0), (1, 1, 1, 1)]);
        assert_eq!(anabranch_proto::tokens::ids(&tick.tokens).collect::<Vec<_>>(), [1, 2, 3, 4, 5]);
        assert_eq!((tick.seq, tick.held_ms, tick.versions.len()), (1, 7, 2));
    }

    #[test]
    fn what_was_not_acknowledged_goes_again_after_a_new_link_and_nothing_else() {
        let mut outbox = Outbox::new();
        for offset in 0..3 {
            outbox.append(Now::ZERO, &segment(0, offset, 1), &[offset], &[0.0]);
            outbox.seal();
        }
        assert_eq!(send_all(&mut outbox), [1, 2, 3]);
        assert!(outbox.ack(1));
        outbox.resend_all();
        assert_eq!(send_all(&mut outbox), [2, 3]);
        assert!(!outbox.ack(9), "a tick that was never sent");
        assert!(outbox.ack(3));
        assert!(outbox.is_empty());
        assert_eq!(outbox.bytes(), 0);
    }

    #[test]
    fn no_tick_outgrows_a_frame_and_no_more_than_a_window_is_in_flight() {
        use prost::Message;
        let mut outbox = Outbox::new();
        let (tokens, logprobs) = (vec![7u32; 1000], vec![0.5f32; 1000]);
        for n in 0..5000 {
            outbox.append(Now::ZERO, &segment(n, 0, 1), &tokens, &logprobs);
        }
        outbox.seal();
        let sent: Vec<pb::Tick> = std::iter::from_fn(|| outbox.next_to_send(Now::ZERO)).collect();
        assert_eq!(sent.len(), WINDOW_TICKS);
        assert!(sent.iter().all(|tick| tick.encoded_len() <= FRAME_BYTES));
    }
}
