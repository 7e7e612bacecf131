//! Ends of samples and groups: finished, abandoned, cancelled, dropped.

use std::sync::Arc;

use anabranch_proto::{GroupId, SampleId};

use super::change::Change;
use super::sample::SampleState;
use super::{Moment, Rollout};
use crate::action::{Action, Finish, Notice, ShortGroup};
use crate::outbox::Outbox;
use crate::timer::Timer;

impl Rollout {
    /// A sample that is off its engine has all its tokens.
    pub fn finish(&mut self, at: Moment, id: SampleId, how: Finish, out: &mut Outbox) {
        if self.sample(id).is_none() {
            return;
        }
        self.end_sample(id, SampleState::Finished { how });
        out.counters.finished += 1;
        self.pool_sample(at, id, out);
        self.sample_ended(at, id.group, out);
    }

    /// Gives a waiting sample up, with its story; never delivered, always reported.
    pub fn abandon(&mut self, at: Moment, id: SampleId, why: &str, out: &mut Outbox) {
        let Some(group) = self.books.group(id.group) else { return };
        if !group.samples()[id.index as usize].is_open() {
            return;
        }
        let key = group.spec.key.to_string();
        self.end_sample(id, SampleState::Abandoned { why: why.to_owned() });
        self.shorten(id.group, why);
        out.counters.abandoned += 1;
        out.tell(Notice::SampleAbandoned { sample: id.to_string(), key, why: why.to_owned() });
        out.act(Action::Forget { samples: vec![id] });
        self.release_siblings(id.group, out);
        self.sample_ended(at, id.group, out);
    }

    /// Ends one waiting sample of a group that is given up: as it is, once the ledger has said what there is
    /// ([`Self::frozen`]), or not delivered at all.
    pub fn give_up(
        &mut self,
        at: Moment,
        id: SampleId,
        why: &str,
        keep_partial: bool,
        out: &mut Outbox,
    ) {
        let has_page = self.sample(id).is_some_and(|sample| sample.live.has_page);
        if keep_partial && has_page {
            if let Some(live) = self.books.sample_live_mut(id) {
                live.ending = true;
            }
            return out.act(Action::FreezePage { sample: id });
        }
        self.end_sample(id, SampleState::Abandoned { why: why.to_owned() });
        out.act(Action::Forget { samples: vec![id] });
        self.sample_ended(at, id.group, out);
    }

    /// The ledger has ended a sample as it was, with `kept` tokens.
    pub fn frozen(
        &mut self,
        at: Moment,
        id: SampleId,
        (kept, oldest): (u32, u64),
        out: &mut Outbox,
    ) {
        let waits = self.sample(id).is_some_and(|sample| *sample.state() == SampleState::Waiting);
        let Some(live) = self.books.sample_live_mut(id).filter(|_| waits) else { return };
        (live.kept, live.oldest) = (kept, oldest);
        self.ages_changed(id.group);
        if kept > 0 {
            return self.finish(at, id, Finish::Cancelled, out);
        }
        let why = self.books.group(id.group).and_then(|group| group.why_short.clone());
        self.give_up(at, id, why.as_deref().unwrap_or_default(), false, out);
    }

    /// A group is about to be given up: its samples wait for no leader any more.
    pub fn begin_giving_up(&mut self, id: GroupId, why: &str) {
        if let Some(live) = self.books.live_mut(id) {
            live.released = true;
        }
        self.shorten(id, why);
    }

    fn shorten(&mut self, group: GroupId, why: &str) {
        if self.books.group(group).is_some_and(|group| group.why_short.is_none()) {
            self.commit_change(Change::Shortened { group, why: Arc::from(why) });
        }
    }

    fn end_sample(&mut self, id: SampleId, to: SampleState) {
        self.queue.remove(id);
        let pin = self.books.group(id.group).and_then(|group| group.spec.pin);
        if let Some(pin) = pin
            && let Some(pinned) = self.pins.get_mut(&pin)
        {
            pinned.open_samples -= 1;
            if pinned.open_samples == 0 {
                self.pins.remove(&pin);
                self.pins_changed = true;
            }
        }
        let tokens = match to {
            SampleState::Finished { .. } => self.sample(id).map_or(0, |sample| sample.live.kept),
            _ => 0,
        };
        self.commit_change(Change::Made { sample: id, tokens });
        self.commit_change(Change::Moved { sample: id, to });
    }

    /// A sample of the group has ended; when the sample was the last one, so has the group.
    fn sample_ended(&mut self, at: Moment, id: GroupId, out: &mut Outbox) {
        let Some(group) = self.books.group(id) else { return };
        if !group.is_over() {
            return;
        }
        let step = group.spec.step;
        let abandoned = group.abandoned();
        let short = (abandoned > 0).then(|| ShortGroup {
            key: group.spec.key.clone(),
            delivered: group.n() - abandoned,
            n: group.n(),
            why: group.why_short.as_deref().unwrap_or_default().to_owned(),
            lengths: group.lengths(),
        });
        out.timers.clear(Timer::Group(id));
        out.timers.clear(Timer::Leader(id));
        self.ages_changed(id);
        if let Some(pinned) = self.books.group(id).and_then(|group| group.spec.pin)
            && let Some(pinned) = self.pins.get_mut(&pinned)
        {
            pinned.groups.remove(&id);
        }
        if self.books.step(step).is_none() {
            return;
        }
        self.commit_change(Change::GroupEnded { group: id, short });
        self.pools.entry(step).or_default().complete(id);
        self.cut_batches(at, step, out);
    }

    /// Takes back what is ready of a group and in no batch. True where samples of the group are still open.
    pub fn drop_ready(&mut self, id: GroupId, why: &str, out: &mut Outbox) -> bool {
        let Some(group) = self.books.group(id) else { return false };
        let (step, open) = (group.spec.step, !group.is_over());
        let lengths = group.lengths();
        if self.books.step(step).is_none() {
            return false;
        }
        let pooled = self.pools.get_mut(&step).map(|pool| pool.drop_group(id)).unwrap_or_default();
        for &sample in &pooled {
            let to = SampleState::Abandoned { why: why.to_owned() };
            self.commit_change(Change::Moved { sample, to });
        }
        out.counters.dropped += pooled.len() as u64;
        out.act(Action::Forget { samples: pooled });
        if !open && let Some(group) = self.books.group(id) {
            let (key, n, delivered) = (group.spec.key.clone(), group.n(), group.delivered());
            let report = ShortGroup { key, delivered, n, why: why.to_owned(), lengths };
            self.commit_change(Change::GroupDropped { group: id, report });
        }
        open
    }
}
