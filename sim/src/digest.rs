//! A world's digest: a hash of every action of the manager's core and its virtual time, and of what was
//! delivered. Two builds that decide alike have equal digests, so a commit that only moves code is checked by
//! `anabranch sim --digests FILE`, then `anabranch sim --digests FILE --compare`.
//!
//! The encoding is written by hand: a tag byte, then numbers (8 bytes, little-endian) and strings (length and
//! bytes). It does not depend on the names or the layout of Rust types. Three things that a change of structure
//! may alter without altering a decision are left out on purpose:
//!
//! - the *value* of an id that the manager invents (session, group, order, key): each is replaced by the order in
//!   which it first appears;
//! - sentences for people (`why`, `error`): only whether there is one counts;
//! - the order between a notice and an action of the same moment: notices have a hash of their own.
//!
//! A struct is taken apart without `..`, so a new field does not compile before somebody decides about it.

mod action;
mod notice;

use std::collections::BTreeMap;
use std::time::Duration;

use anabranch_manager::action::Action;
use anabranch_manager::ledger::{PageView, SpanRecord};
use anabranch_proto::{GroupId, OrderId, SampleId, SessionId, Version};
use anabranch_runtime::clock::Now;

/// Collector of one world's digest.
pub(crate) struct Digest {
    actions: blake3::Hasher,
    notices: blake3::Hasher,
    names: Names,
    out: Vec<u8>,
}

/// Ids that the manager invents, by the order of their first appearance.
#[derive(Default)]
struct Names {
    known: BTreeMap<(Kind, Vec<u8>), u64>,
    next: BTreeMap<Kind, u64>,
}

/// Kind of an id.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Session,
    Group,
    Order,
    Prompt,
    Key,
    /// A sample in the form that a notice writes.
    SampleText,
}

/// One record that is being written.
struct Record<'a> {
    out: &'a mut Vec<u8>,
    names: &'a mut Names,
}

// === impl Digest ===

impl Digest {
    /// A digest of nothing.
    pub fn new() -> Self {
        Self {
            actions: blake3::Hasher::new(),
            notices: blake3::Hasher::new(),
            names: Names::default(),
            out: Vec::new(),
        }
    }

    /// Adds one action of the core, decided at `now`.
    pub fn action(&mut self, now: Now, action: &Action) {
        let is_notice = matches!(action, Action::Emit(_));
        self.record(is_notice, |record| {
            record.wait(now.0);
            action::put(record, action);
        });
    }

    /// Adds the content of one trajectory, as it is delivered.
    pub fn delivered(&mut self, view: &PageView) {
        let PageView { tokens, logprobs, spans, columns } = view;
        self.record(false, |record| {
            record.tag(200);
            record.bytes(tokens);
            record.bytes(logprobs);
            record.num(columns.len() as u64);
            record.list(spans, Record::span);
        });
    }

    /// The digest as 32 hexadecimal digits: the first half is of the actions, the second of the notices.
    pub fn finish(&self) -> String {
        let half = |hasher: &blake3::Hasher| hasher.finalize().to_hex()[..16].to_owned();
        half(&self.actions) + &half(&self.notices)
    }

    fn record(&mut self, is_notice: bool, put: impl FnOnce(&mut Record<'_>)) {
        self.out.clear();
        put(&mut Record { out: &mut self.out, names: &mut self.names });
        let hasher = if is_notice { &mut self.notices } else { &mut self.actions };
        hasher.update(&self.out);
    }
}

// === impl Names ===

impl Names {
    fn number(&mut self, kind: Kind, id: &[u8]) -> u64 {
        if let Some(number) = self.known.get(&(kind, id.to_vec())) {
            return *number;
        }
        let next = self.next.entry(kind).or_default();
        *next += 1;
        self.known.insert((kind, id.to_vec()), *next);
        *next
    }
}

// === impl Record ===

impl Record<'_> {
    fn tag(&mut self, tag: u8) {
        self.out.push(tag);
    }

    fn flag(&mut self, flag: bool) {
        self.out.push(u8::from(flag));
    }

    fn num(&mut self, number: impl Into<u64>) {
        self.out.extend_from_slice(&number.into().to_le_bytes());
    }

    fn float(&mut self, number: f32) {
        self.out.extend_from_slice(&number.to_bits().to_le_bytes());
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.num(bytes.len() as u64);
        self.out.extend_from_slice(bytes);
    }

    fn text(&mut self, text: &str) {
        self.bytes(text.as_bytes());
    }

    /// Writes whether there is a sentence for people.
    fn sentence(&mut self, text: &str) {
        self.flag(!text.is_empty());
    }

    fn wait(&mut self, wait: Duration) {
        self.num(u64::try_from(wait.as_nanos()).unwrap_or(u64::MAX));
    }

    fn option<T>(&mut self, value: Option<T>, put: impl FnOnce(&mut Self, T)) {
        self.flag(value.is_some());
        if let Some(value) = value {
            put(self, value);
        }
    }

    fn list<'v, T: 'v>(
        &mut self,
        values: impl IntoIterator<Item = &'v T, IntoIter: ExactSizeIterator>,
        mut put: impl FnMut(&mut Self, &'v T),
    ) {
        let values = values.into_iter();
        self.num(values.len() as u64);
        values.for_each(|value| put(self, value));
    }

    fn name(&mut self, kind: Kind, id: &[u8]) {
        let number = self.names.number(kind, id);
        self.num(number);
    }

    fn session(&mut self, session: SessionId) {
        self.name(Kind::Session, &session.0.to_le_bytes());
    }

    fn order(&mut self, order: OrderId) {
        self.name(Kind::Order, &order.0.to_le_bytes());
    }

    fn group(&mut self, group: GroupId) {
        self.name(Kind::Group, &group.0.to_le_bytes());
    }

    fn sample(&mut self, sample: SampleId) {
        self.group(sample.group);
        self.num(sample.index);
    }

    fn prompt(&mut self, digest: u64) {
        self.name(Kind::Prompt, &digest.to_le_bytes());
    }

    fn key(&mut self, key: &[u8; 32]) {
        self.name(Kind::Key, key);
    }

    fn version(&mut self, version: &Version) {
        let Version { epoch, number, root } = version;
        self.num(*epoch);
        self.num(*number);
        self.out.extend_from_slice(&root.0);
    }

    fn span(&mut self, span: &SpanRecord) {
        let SpanRecord { start, len, maker, version, exact, kv_recomputed } = span;
        self.num(*start);
        self.num(*len);
        self.text(maker.engine.as_str());
        self.num(maker.incarnation.0);
        self.flag(maker.by_trainer);
        self.version(version);
        self.flag(*exact);
        self.flag(*kv_recomputed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest_of(actions: &[(u64, Action)]) -> String {
        let mut digest = Digest::new();
        for (at, action) in actions {
            digest.action(Now::from_millis(*at), action);
        }
        digest.finish()
    }

    fn stop(session: u64, group: u64) -> Action {
        Action::Stop {
            session: SessionId(session),
            sample: SampleId::new(group, 0),
            attempt: anabranch_proto::Attempt(1),
            why: "moved",
        }
    }

    #[test]
    fn the_value_of_an_id_does_not_count_and_its_identity_does() {
        let base = digest_of(&[(1, stop(7, 8)), (2, stop(7, 8))]);
        assert_eq!(base, digest_of(&[(1, stop(70, 1)), (2, stop(70, 1))]));
        assert_ne!(base, digest_of(&[(1, stop(7, 8)), (2, stop(9, 8))]));
    }

    #[test]
    fn the_time_of_an_action_counts() {
        assert_ne!(digest_of(&[(1, stop(7, 8))]), digest_of(&[(2, stop(7, 8))]));
    }

    #[test]
    fn the_encoding_is_what_it_was() {
        let forget = Action::Forget { samples: vec![SampleId::new(3, 1)] };
        let digest = digest_of(&[(1, stop(7, 8)), (5, forget)]);
        assert_eq!(&digest[..16], "497343760eb955f8");
    }
}
