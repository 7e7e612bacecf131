//! What the trainer does of itself: open, submit, take batches, commit, publish, switch modes.

use std::time::Duration;

use anabranch_manager::action::{Answer, FailKind, SubmitVerdict};
use anabranch_manager::event::{
    Announce, ConsumerId, Event, LogprobsMode, Model, NewGroup, OpenJob, PublisherId, ReplyTo,
    Sampling, Shard,
};
use anabranch_proto::{BatchSeq, EngineId, SessionId, Step, Version, tokens};

use super::{Waiting, World};
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
            on_trainer_lost: Duration::from_secs(60),
            resume: resumes.then_some(self.trainer.committed),
            seed: self.scenario.seed,
            rolling: self.scenario.rolling,
        };
        self.trainer.phase = Phase::Opening;
        let reply = self.ask(Waiting::Open);
        self.post(Event::JobOpened { open: Box::new(open), reply });
    }

    pub(super) fn consume(&mut self, shard: u32) {
        let Some(session) = self.trainer.session else { return };
        if self.trainer.consumers.values().any(|other| *other == shard) {
            return;
        }
        self.next += 1;
        let consumer = ConsumerId(self.next);
        self.trainer.consumers.insert(consumer, shard);
        // What was sent and not acknowledged on the old stream comes again.
        let pack = self.scenario.pack;
        let shard = Shard { index: shard, count: self.scenario.shards };
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

    /// Has the step come whole?
    pub(super) fn advance(&mut self) {
        let Phase::Waiting { step } = self.trainer.phase else { return };
        let Some(seq) = self.trainer.has_step(step, self.scenario.shards) else { return };
        self.trainer.phase = Phase::Training { step };
        if self.scenario.colocated {
            self.switch(true, step);
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

    fn publish(&mut self, _step: Option<u64>) {
        let Some(session) = self.trainer.session else { return };
        let version = self.trainer.next_version();
        self.outcome.versions += 1;
        let publisher = *self.trainer.publisher.get_or_insert(PublisherId(version.number << 32));
        let announce = Announce {
            session,
            version: Version { root: anabranch_proto::Root::default(), ..version },
            addresses: vec!["10.0.0.9:7000".into()],
            dials: false,
            bytes: 1 << 20,
            directory: None,
            sender: None,
        };
        let reply = self.ask(Waiting::Announce { version });
        self.post(Event::VersionAnnounced { publisher, announce: Box::new(announce), reply });
    }

    pub(super) fn answered(&mut self, to: ReplyTo, answer: Answer) {
        let Some(waiting) = self.waiting.remove(&to) else { return };
        match (waiting, answer) {
            (Waiting::Nothing, _) => {}
            // A trainer that was restarted meanwhile does not get its old answers.
            (_, Answer::Failed { kind: FailKind::Conflict, .. }) => {}
            (Waiting::Open, Answer::Opened { session, .. }) => self.opened(session),
            (Waiting::Submit { step }, Answer::Submitted(results)) => {
                for result in results {
                    match result.verdict {
                        SubmitVerdict::Accepted => {
                            self.admitted.insert(result.key);
                        }
                        SubmitVerdict::Duplicate => {}
                        SubmitVerdict::Rejected { why, .. } => {
                            self.asked.remove(&result.key);
                            self.note(format!("step {step}: {} rejected: {why}", result.key));
                        }
                    }
                }
                self.advance();
            }
            (Waiting::Announce { version }, Answer::Done) => {
                let Some(publisher) = self.trainer.publisher else { return };
                let step = match self.trainer.phase {
                    Phase::Training { step } => Some(step),
                    _ => None,
                };
                let reply = self.ask(Waiting::Seal { step });
                self.post(Event::VersionSealed { publisher, version, reply });
            }
            (Waiting::Seal { step }, Answer::Done) => self.sealed(step),
            (Waiting::Train { step, by }, Answer::ModeSet(_)) => {
                self.in_time(by);
                if self.trainer.phase == (Phase::Training { step }) {
                    self.publish(Some(step));
                }
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
        for shard in 0..self.scenario.shards {
            self.consume(shard);
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

    fn sealed(&mut self, step: Option<u64>) {
        let Some(step) = step else { return };
        if self.trainer.phase != (Phase::Training { step }) {
            return;
        }
        if !self.scenario.colocated {
            return self.next_step(step);
        }
        // It loads its own engine while that has given its memory back.
        let version = crate::trainer::version(self.trainer.epoch, self.trainer.version);
        for engine in &mut self.engines {
            if engine.by_trainer && engine.released {
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
            .filter(|engine| engine.by_trainer && engine.alive)
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
            false => self.trainer.phase = Phase::Done,
        }
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
        NewGroup {
            key: key.to_owned(),
            prompt: tokens::encode_ids(&self.prompt(key)),
            n,
            sampling: std::sync::Arc::new(Sampling::new(self.scenario.max_tokens)),
            pin,
            priority: 0,
            deadline: None,
            meta: bytes::Bytes::new(),
            session: String::new(),
        }
    }
}
