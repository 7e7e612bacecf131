//! Actions of the trainer: open, submit, take batches, commit, publish, switch modes.

use std::time::Duration;

use anabranch_manager::action::{Answer, FailKind, SubmitResult, SubmitVerdict};
use anabranch_manager::event::{
    Announce, ConsumerId, Event, LogprobsMode, Model, NewGroup, OpenJob, PublisherId, Replay,
    ReplyTo, Sampling, SenderOf, Shard,
};
use anabranch_proto::{BatchSeq, EngineId, SessionId, Step, Version, tokens};

use super::{Happening, Waiting, World};
use crate::scenario::Publishes;
use crate::trainer::Phase;

const MODE_DEADLINE: Duration = Duration::from_secs(5);

impl World {
    pub(super) fn open_job(&mut self) {
        let resumes = self.trainer.phase == Phase::Down;
        let open = OpenJob {
            job: "sim".into(),
            epoch: self.trainer.epoch,
            model: Model::default(),
            logprobs_mode: LogprobsMode::Tempered,
            staleness: self.scenario.staleness,
            on_running: self.scenario.on_running,
            on_trainer_lost: self.scenario.trainer.on_lost,
            resume: resumes.then_some(self.trainer.committed),
            seed: self.scenario.seed,
            rolling: self.scenario.rolling,
            join: false,
        };
        self.trainer.phase = Phase::Opening;
        let reply = self.ask(Waiting::Open);
        self.post(Event::JobOpened { open: Box::new(open), reply });
    }

    pub(super) fn consume(&mut self, shard: u32) {
        let Some(session) = self.trainer.session else { return };
        let taken = self.trainer.consumers.values().any(|other| *other == shard);
        if taken || shard >= self.trainer.shards {
            return;
        }
        self.next += 1;
        let consumer = ConsumerId(self.next);
        self.trainer.consumers.insert(consumer, shard);
        // What was sent and not acknowledged on the old stream comes again.
        let pack = self.scenario.pack;
        let shard = Shard { index: shard, count: self.trainer.shards };
        self.core_event(Event::ConsumerAttached { session, consumer, pack, shard });
        let samples = self.rng.range(1, 30);
        self.post(Event::CreditGranted { consumer, bytes: 1 << 20, samples });
    }

    pub(super) fn take(&mut self, consumer: ConsumerId, batch: &super::Batch, samples: &[usize]) {
        let Some(&shard) = self.trainer.consumers.get(&consumer) else { return };
        let seen = self.trainer.seen.get(&shard).copied().unwrap_or_default();
        // What came twice is acknowledged (and its credit given) twice, and taken once.
        if batch.seq > seen
            && let Err(what) = self.trainer.take(shard, batch, samples)
        {
            return self.fail(what);
        }
        let seq = batch.seq;
        self.post(Event::BatchAcked { consumer, seq });
        let (bytes, samples) = (1 << 20, samples.len() as u64);
        self.post(Event::CreditGranted { consumer, bytes, samples });
        self.advance();
    }

    /// Goes on to training if the step has come whole.
    pub(super) fn advance(&mut self) {
        let Phase::Waiting { step } = self.trainer.phase else { return };
        let Some(seq) = self.trainer.has_step(step) else { return };
        self.trainer.phase = Phase::Training { step };
        if self.scenario.colocated {
            self.switch(true, step);
        } else if self.scenario.trainer.overlaps {
            let soon = Duration::from_millis(self.rng.range(0, 1_500));
            self.after(soon, Happening::Publish);
            self.commit(seq);
            return self.next_step(step);
        } else {
            self.publish(Some(step));
        }
        self.commit(seq);
    }

    fn commit(&mut self, seq: BatchSeq) {
        self.trainer.committed = seq;
        let consumers: Vec<_> = self.trainer.consumers.keys().copied().collect();
        for consumer in consumers {
            self.post(Event::BatchCommitted { consumer, seq });
        }
    }

    fn switch(&mut self, train: bool, step: u64) {
        let Some(session) = self.trainer.session else { return };
        let by = self.now + MODE_DEADLINE + Duration::from_secs(1);
        let what = if train { Waiting::Train { step, by } } else { Waiting::Generate { step, by } };
        let reply = self.ask(what);
        self.post(Event::ModeRequested { session, train, deadline: MODE_DEADLINE, reply });
    }

    /// Publishes the next version, by all its senders. `step`: training waits for it.
    pub(super) fn publish(&mut self, step: Option<u64>) {
        if self.trainer.session.is_none() {
            return;
        }
        let version = self.trainer.next_version();
        self.outcome.versions += 1;
        self.announce(version, step);
    }

    /// Publishes the newest version again, after its stream broke.
    pub(super) fn republish(&mut self) {
        if self.trainer.session.is_some() && self.trainer.version > 0 {
            let version = crate::trainer::version(self.trainer.epoch, self.trainer.version);
            self.announce(version, None);
        }
    }

    fn announce(&mut self, version: Version, step: Option<u64>) {
        let Some(session) = self.trainer.session else { return };
        let side = self.scenario.trainer.clone();
        self.trainer.unsealed.insert(version.number, side.senders);
        for sender in 0..side.senders {
            self.next += 1;
            let fresh = PublisherId(self.next);
            let publisher = *self.trainer.publishers.entry(sender).or_insert(fresh);
            let listens = side.publishes == Publishes::Listens;
            let in_directory = side.publishes == Publishes::Directory;
            let of = SenderOf { index: sender, count: side.senders, part: side.parts };
            let announce = Announce {
                session,
                version: Version { root: anabranch_proto::Root::default(), ..version },
                addresses: listens.then(|| format!("10.0.1.{sender}:7000")).into_iter().collect(),
                dials: side.publishes == Publishes::Dials,
                bytes: 1 << 20,
                directory: in_directory.then(|| "/checkpoints".to_owned()),
                sender: (side.senders > 1).then_some(of),
            };
            let reply = self.ask(Waiting::Announce { version, sender, step });
            self.post(Event::VersionAnnounced { publisher, announce: Box::new(announce), reply });
        }
    }

    fn seal(&mut self, version: Version, sender: u32, step: Option<u64>) {
        let Some(&publisher) = self.trainer.publishers.get(&sender) else { return };
        let reply = self.ask(Waiting::Seal { version, step });
        self.post(Event::VersionSealed { publisher, version, reply });
    }

    /// True if no version is on its way to the manager.
    pub(crate) fn publishes_nothing(&self) -> bool {
        let publishes = |w: &Waiting| matches!(w, Waiting::Announce { .. } | Waiting::Seal { .. });
        !self.waiting.values().any(publishes)
    }

    pub(super) fn submit_again(&mut self, step: u64) {
        if self.trainer.phase == (Phase::Waiting { step }) {
            self.submit(step);
        }
    }

    pub(super) fn answered(&mut self, to: ReplyTo, answer: Answer) {
        let Some(waiting) = self.waiting.remove(&to) else { return };
        match (waiting, answer) {
            (Waiting::Nothing, _) => {}
            // A trainer that was restarted meanwhile does not get its old answers.
            (_, Answer::Failed { kind: FailKind::Conflict, .. }) => {}
            (Waiting::Open, Answer::Opened { session, .. }) => self.opened(session),
            (Waiting::Submit { step }, Answer::Submitted(results)) => {
                self.submitted(step, results);
                self.advance();
            }
            (Waiting::Announce { version, sender, step }, Answer::Done) => {
                self.seal(version, sender, step);
            }
            (Waiting::Close, Answer::Done) => self.trainer.phase = Phase::Done,
            (Waiting::Seal { version, step }, Answer::Done) => self.sealed(version, step),
            (Waiting::Train { step, by }, Answer::ModeSet(_)) => {
                self.in_time(by);
                self.after(self.scenario.trainer.trains, Happening::Trained { step });
            }
            (Waiting::Generate { step, by }, Answer::ModeSet(_)) => {
                self.in_time(by);
                self.attest();
                self.next_step(step);
            }
            (_, Answer::Failed { why, .. }) => self.note(format!("answer: {why}")),
            (_, answer) => self.fail(format!("an answer nobody asked for: {answer:?}")),
        }
    }

    fn submitted(&mut self, step: u64, results: Vec<SubmitResult>) {
        let mut again = None;
        for SubmitResult { key, verdict } in results {
            match verdict {
                SubmitVerdict::Accepted => {
                    self.admitted.insert(key);
                }
                SubmitVerdict::Duplicate => {}
                SubmitVerdict::Rejected { why, retry_after } => {
                    self.asked.remove(&key);
                    self.note(format!("step {step}: {key} rejected: {why}"));
                    again = again.or(retry_after);
                }
            }
        }
        if let Some(wait) = again {
            self.after(wait, Happening::Submit { step });
        }
    }

    pub(super) fn trained(&mut self, step: u64) {
        if self.trainer.phase == (Phase::Training { step }) {
            self.publish(Some(step));
        }
    }

    fn in_time(&mut self, by: anabranch_runtime::clock::Now) {
        if self.now > by + Duration::from_secs(9) {
            self.fail(format!(
                "I8: the mode switch took until {}, its deadline was {by}",
                self.now
            ));
        }
    }

    fn opened(&mut self, session: SessionId) {
        self.trainer.session = Some(session);
        for said in std::mem::take(&mut self.zombies) {
            let late = Duration::from_millis(self.rng.range(10, 3_000));
            self.after(late, Happening::Core(said));
        }
        self.consume(0);
        for shard in 1..self.trainer.shards {
            self.after(self.scenario.trainer.stagger * shard, Happening::Consume { shard });
        }
        if self.trainer.version > 0 || self.trainer.epoch > 1 {
            self.publish(None);
        }
        let step = (0..self.scenario.steps).find(|step| !self.trainer.done.contains_key(step));
        match step {
            Some(step) => self.submit(step),
            None => self.trainer.phase = Phase::Done,
        }
    }

    fn sealed(&mut self, version: Version, step: Option<u64>) {
        if let Some(left) = self.trainer.unsealed.get_mut(&version.number) {
            *left = left.saturating_sub(1);
        }
        let all = self.trainer.unsealed.get(&version.number).is_none_or(|left| *left == 0);
        let Some(step) = step.filter(|_| all) else { return };
        if self.trainer.phase != (Phase::Training { step }) {
            return;
        }
        if !self.scenario.colocated {
            return self.next_step(step);
        }
        // It loads its own engine while that has given its memory back.
        let version = crate::trainer::version(self.trainer.epoch, self.trainer.version);
        for engine in &mut self.engines {
            if engine.by_trainer() && engine.released {
                engine.loaded = version;
            }
        }
        self.switch(false, step);
    }

    fn attest(&mut self) {
        let Some(session) = self.trainer.session else { return };
        let loaded: Vec<(EngineId, Version)> = self
            .engines
            .iter()
            .filter(|engine| engine.by_trainer() && engine.alive)
            .map(|engine| (EngineId::new(&engine.name), engine.loaded))
            .collect();
        for (engine, version) in loaded {
            let reply = self.no_reply();
            self.post(Event::EngineReported { session, engine, version, reply });
        }
    }

    fn next_step(&mut self, step: u64) {
        if self.trainer.phase != (Phase::Training { step }) {
            return;
        }
        match step + 1 < self.scenario.steps {
            true => self.submit(step + 1),
            false => {
                // After the last commit has arrived.
                self.trainer.phase = Phase::Closing;
                self.after(2 * super::LATENCY, Happening::Close);
            }
        }
    }

    pub(super) fn close(&mut self) {
        let Some(session) = self.trainer.session.filter(|_| self.scenario.trainer.closes) else {
            self.trainer.phase = Phase::Done;
            return;
        };
        let (reply, cancel_running) = (self.ask(Waiting::Close), self.rng.chance(50));
        self.post(Event::JobClosed { session, cancel_running, reply });
    }

    fn submit(&mut self, step: u64) {
        let Some(session) = self.trainer.session else { return };
        self.trainer.phase = Phase::Waiting { step };
        let n = self.scenario.n;
        let mut groups = Vec::new();
        for group in 0..self.scenario.groups_per_step {
            let key = format!("s{step}g{group}");
            if self.trainer.has_whole(&key, n) {
                continue;
            }
            let current = self.core.state(self.now).current;
            let pinned = self.scenario.pinned_groups && group == 0 && !current.is_base();
            let known = self.admitted.contains(&key);
            if pinned && !known {
                self.pins.insert(key.clone(), current);
            }
            let pin = self.pins.get(&key).copied();
            self.asked.insert(key.clone(), n);
            groups.push(self.group(&key, n, pin));
        }
        let reply = self.ask(Waiting::Submit { step });
        self.post(Event::GroupsSubmitted {
            session,
            step: Step(step),
            is_final: true,
            groups,
            reply,
        });
    }

    fn group(&self, key: &str, n: u32, pin: Option<Version>) -> NewGroup {
        let side = &self.scenario.trainer;
        let deadline = Duration::from_millis(100 + 40 * draw(key, 2));
        NewGroup {
            key: key.to_owned(),
            prompt: tokens::encode_ids(&self.prompt(key)),
            n,
            sampling: std::sync::Arc::new(self.sampling(key)),
            pin,
            priority: if side.priorities { draw(key, 4) as i32 % 3 - 1 } else { 0 },
            deadline: (draw(key, 5) < side.deadlines).then_some(deadline),
            meta: bytes::Bytes::new(),
            session: String::new(),
        }
    }

    /// Settings of a group. Some groups have penalties or stop strings: they restart from their prompt.
    fn sampling(&self, key: &str) -> Sampling {
        let plain = Sampling::new(self.scenario.max_tokens);
        if draw(key, 0) >= self.scenario.trainer.replayed {
            return plain;
        }
        // A few ask for the impossible, and are rejected.
        let replay = if draw(key, 3) < 5 { Replay::default() } else { Replay::RestartOk };
        match draw(key, 1) < 50 {
            true => Sampling { presence_penalty: 0.5, replay, ..plain },
            // The model writes no text: no string ever matches.
            false => Sampling { stop_strings: vec!["stop".into()], replay, ..plain },
        }
    }
}

/// A property of a group, in [0, 100): the same each time that the group is submitted.
fn draw(key: &str, property: u8) -> u64 {
    let hash = blake3::Hasher::new().update(key.as_bytes()).update(&[property]).finalize();
    u64::from(u16::from_le_bytes([hash.as_bytes()[0], hash.as_bytes()[1]])) % 100
}
