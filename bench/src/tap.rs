//! Listens in on the link between one agent and its manager: when did which tokens pass, and when did the manager say
//! that it has them. Reads just enough HTTP/2 and gRPC for that; changes nothing that passes. Owns what it saw.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard};

use anabranch_proto::pb;
use bytes::{Buf, Bytes, BytesMut};
use pb::{data_from_agent::Kind as Up, data_to_agent::Kind as Down};
use prost::Message;

use crate::meter::monotonic_ns;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const FRAME_HEADER: usize = 9;
const DATA: u8 = 0;
const PADDED: u8 = 8;
const GRPC_HEADER: usize = 5;

/// Tokens `[from, upto)` of a sample that passed on their way to the manager.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Passed {
    /// Seed of the sample.
    pub seed: u64,
    /// First token.
    pub from: u64,
    /// End of the tokens.
    pub upto: u64,
    /// Time at which they passed, in monotonic nanoseconds.
    pub at_ns: u64,
    /// Time at which the manager's acknowledgement of their tick passed, in monotonic nanoseconds.
    pub acked_ns: Option<u64>,
}

/// Tokens and acknowledgements that passed between one agent and its manager.
#[derive(Default)]
pub struct Tap {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Both directions of every connection; true: bytes of the agent.
    sides: BTreeMap<(u64, bool), Side>,
    seeds: BTreeMap<(u64, u32), u64>,
    /// Tokens that passed, each with the number of their tick.
    passed: Vec<(u64, Passed)>,
    /// Index in `passed` of the first tokens that are not acknowledged.
    unacked: usize,
}

/// One direction of one connection, with the bytes that do not make a whole message yet.
#[derive(Default)]
struct Side {
    rest: BytesMut,
    /// Received part of a gRPC message, by HTTP/2 stream.
    streams: BTreeMap<u32, BytesMut>,
}

impl Tap {
    /// Takes note of bytes that passed. Called in order for each side of a connection.
    pub fn saw(&self, connection: u64, from_agent: bool, bytes: &[u8]) {
        let now_ns = monotonic_ns();
        let mut state = self.lock();
        let messages = state.sides.entry((connection, from_agent)).or_default().take(bytes);
        for message in messages {
            // Messages of the control stream decode to nothing that is looked for, or not at all.
            match from_agent {
                true => state.up(message, now_ns),
                false => state.down(message, now_ns),
            }
        }
    }

    /// The tokens that passed so far.
    pub fn passed(&self) -> Vec<Passed> {
        self.lock().passed.iter().map(|(_, passed)| *passed).collect()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no code panics while it holds this lock")
    }
}

impl State {
    fn up(&mut self, message: Bytes, at_ns: u64) {
        let Ok(pb::DataFromAgent { kind: Some(Up::Tick(tick)) }) =
            pb::DataFromAgent::decode(message)
        else {
            return;
        };
        for seg in &tick.segs {
            let Some(&seed) = self.seeds.get(&(seg.group, seg.index)) else { continue };
            let (from, upto) = (u64::from(seg.offset), u64::from(seg.offset + seg.count));
            self.passed.push((tick.seq, Passed { seed, from, upto, at_ns, acked_ns: None }));
        }
    }

    fn down(&mut self, message: Bytes, at_ns: u64) {
        match pb::DataToAgent::decode(message) {
            Ok(pb::DataToAgent { kind: Some(Down::Start(start)) }) => {
                if let Some(sample) = start.sample {
                    self.seeds.insert((sample.group, sample.index), start.seed);
                }
            }
            Ok(pb::DataToAgent { kind: Some(Down::Ack(ack)) }) => {
                let waiting = &mut self.passed[self.unacked..];
                let acked = waiting.iter_mut().take_while(|(tick, _)| *tick <= ack.seq);
                self.unacked += acked.map(|(_, passed)| passed.acked_ns = Some(at_ns)).count();
            }
            _ => {}
        }
    }
}

impl Side {
    /// The gRPC messages that are complete now.
    fn take(&mut self, bytes: &[u8]) -> Vec<Bytes> {
        self.rest.extend_from_slice(bytes);
        if self.rest.starts_with(PREFACE) {
            self.rest.advance(PREFACE.len());
        }
        let mut out = Vec::new();
        while let Some((kind, flags, stream, payload)) = self.frame() {
            if kind == DATA {
                let buffer = self.streams.entry(stream).or_default();
                buffer.extend_from_slice(unpadded(flags, &payload));
                out.extend(std::iter::from_fn(|| grpc_message(buffer)));
            }
        }
        out
    }

    fn frame(&mut self) -> Option<(u8, u8, u32, Bytes)> {
        let header = self.rest.get(..FRAME_HEADER)?;
        let len = u32::from_be_bytes([0, header[0], header[1], header[2]]) as usize;
        let (kind, flags) = (header[3], header[4]);
        let stream =
            u32::from_be_bytes([header[5], header[6], header[7], header[8]]) & (u32::MAX >> 1);
        if self.rest.len() < FRAME_HEADER + len {
            return None;
        }
        self.rest.advance(FRAME_HEADER);
        Some((kind, flags, stream, self.rest.split_to(len).freeze()))
    }
}

fn unpadded(flags: u8, payload: &[u8]) -> &[u8] {
    match payload.split_first() {
        Some((&pad, rest)) if flags & PADDED != 0 => &rest[..rest.len().saturating_sub(pad.into())],
        _ => payload,
    }
}

fn grpc_message(buffer: &mut BytesMut) -> Option<Bytes> {
    let header = buffer.get(..GRPC_HEADER)?;
    let len = u32::from_be_bytes([header[1], header[2], header[3], header[4]]) as usize;
    if buffer.len() < GRPC_HEADER + len {
        return None;
    }
    buffer.advance(GRPC_HEADER);
    Some(buffer.split_to(len).freeze())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As on the wire: one gRPC message, cut over two DATA frames.
    fn frames(stream: u32, message: &impl Message) -> Vec<u8> {
        let body = message.encode_to_vec();
        let mut grpc = vec![0];
        grpc.extend((body.len() as u32).to_be_bytes());
        grpc.extend(body);
        let (a, b) = grpc.split_at(grpc.len() / 2);
        let frame = |part: &[u8]| {
            let mut out = (part.len() as u32).to_be_bytes()[1..].to_vec();
            out.extend([DATA, 0]);
            out.extend(stream.to_be_bytes());
            out.extend_from_slice(part);
            out
        };
        [frame(a), frame(b)].concat()
    }

    fn tick(seq: u64, offset: u32) -> pb::DataFromAgent {
        let seg =
            pb::Seg { group: 4, index: 1, attempt: 1, offset, count: 8, ..Default::default() };
        pb::DataFromAgent {
            kind: Some(Up::Tick(pb::Tick { seq, segs: vec![seg], ..Default::default() })),
        }
    }

    #[test]
    fn ticks_are_told_by_seed_and_acknowledged_even_byte_by_byte() {
        let tap = Tap::default();
        let start = pb::Start {
            sample: Some(pb::Sample { group: 4, index: 1 }),
            seed: 99,
            ..Default::default()
        };
        tap.saw(1, false, &frames(3, &pb::DataToAgent { kind: Some(Down::Start(start)) }));
        let mut up = PREFACE.to_vec();
        up.extend(frames(3, &tick(1, 0)));
        up.extend(frames(3, &tick(2, 8)));
        up.chunks(5).for_each(|part| tap.saw(1, true, part));
        let ack = pb::DataToAgent { kind: Some(Down::Ack(pb::TickAck { seq: 1 })) };
        tap.saw(1, false, &frames(3, &ack));
        let passed = tap.passed();
        let spans: Vec<_> =
            passed.iter().map(|p| (p.seed, p.from, p.upto, p.acked_ns.is_some())).collect();
        assert_eq!(spans, [(99, 0, 8, true), (99, 8, 16, false)]);
    }
}
