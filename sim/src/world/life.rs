//! What agents and the trainer do of themselves: dial, generate, load, drain; open, submit, publish, commit.

use std::collections::BTreeMap;
use std::time::Duration;

use anabranch_manager::core::action::{Answer, FailKind, ModeKind, SubmitVerdict};
use anabranch_manager::core::event::{
    Announce, ConsumerId, Convention, EngineHello, Event, LinkId, LoadReport, LoadStage,
    ModeReport, ModelFacts, NewGroup, OnRunning, OpenJob, PublisherId, ReplyTo, Sampling,
    SeedKeying, Shard,
};
use anabranch_proto::pb::end::Why;
use anabranch_proto::{
    BatchSeq, EngineId, Incarnation, OrderId, SessionId, Step, Version, pb, tokens,
};

use super::{Happening, TICK, ToAgent, Waiting, World};
use crate::fleet::{LoadRun, SimEngine};
use crate::trainer::Phase;

const MODE_DEADLINE: Duration = Duration::from_secs(5);

impl World {
    pub(super) fn happen_outside(&mut self, happening: Happening) {
        match happening {
            Happening::Make { engine } => self.make(engine),
            Happening::Redial { engine } => self.dial(engine),
            Happening::Reborn { engine } => self.reborn(engine),
            Happening::NetUp { engine } => {
                self.engines[engine].net_up = true;
                self.resend(engine);
                if self.engines[engine].link.is_none_or(|link| !self.links.contains_key(&link)) {
                    self.redial(engine, Duration::from_millis(30));
                }
            }
            Happening::Recover { engine } => self.engines[engine].slow = 1,
            Happening::LoadStep { engine, incarnation, order } => {
                self.load_step(engine, incarnation, order)
            }
            Happening::DrainOver { engine, incarnation, order } => {
                self.drain_over(engine, incarnation, order);
            }
            Happening::Beats => self.beats(),
            Happening::OpenJob => self.open_job(),
            Happening::Consume { shard } => self.consume(shard),
            Happening::Take { consumer, batch, samples } => self.take(consumer, &batch, &samples),
            Happening::Done { consumer, report } => {
                if self.trainer.consumers.contains_key(&consumer) {
                    self.trainer.step_done(&report);
                    self.advance();
                }
            }
            Happening::Answer { to, answer } => self.answered(to, answer),
            _ => {}
        }
    }

    // Agents

    fn beats(&mut self) {
        for engine in 0..self.engines.len() {
            let agent = &self.engines[engine];
            if let (true, true, true, Some(session)) =
                (agent.alive, agent.net_up, agent.attached, agent.session)
            {
                self.to_core(Event::EngineBeat { session, running: 0, waiting: 0, kv_used: 0.0 });
            }
        }
        self.after(Duration::from_millis(900), Happening::Beats);
    }

    pub(crate) fn redial(&mut self, engine: usize, wait: Duration) {
        self.after(wait, Happening::Redial { engine });
    }

    /// The connection is gone on both sides; `heard`: the manager notices at once.
    pub(crate) fn break_link(&mut self, engine: usize, heard: bool) {
        let agent = &mut self.engines[engine];
        agent.attached = false;
        let Some(link) = agent.link.take() else { return };
        self.links.remove(&link);
        if heard {
            self.to_core(Event::LinkLost { link, why: "reset" });
        }
    }

    fn dial(&mut self, engine: usize) {
        let agent = &self.engines[engine];
        if !agent.alive
            || !agent.net_up
            || agent.link.is_some_and(|link| self.links.contains_key(&link))
        {
            return;
        }
        self.fresh_link(engine);
    }

    fn fresh_link(&mut self, engine: usize) {
        self.next += 1;
        let link = LinkId(self.next);
        let agent = &mut self.engines[engine];
        agent.link = Some(link);
        agent.attached = false;
        let hello = EngineHello {
            id: EngineId::new(&agent.name),
            incarnation: Incarnation(agent.incarnation),
            model: ModelFacts {
                id: "synthetic".into(),
                tokenizer_digest: String::new(),
                vocab: self.params.vocab,
                max_context: 4096,
                eos_ids: vec![self.params.eos_id],
            },
            conventions: vec![Convention::Tempered],
            seed_keying: SeedKeying::AbsolutePosition,
            columns: vec![],
            release_memory: true,
            weights_by_trainer: agent.by_trainer,
            kv_tokens: 8_000,
            max_running: 24,
            gpus: 1,
            labels: match agent.by_trainer {
                true => BTreeMap::from([("colocated".into(), "true".into())]),
                false => BTreeMap::new(),
            },
            addresses: vec!["10.0.0.1:9000".into()],
            held: agent.held(),
            loaded: agent.loaded,
            resume: agent.session,
            manager_epoch: 1,
            kind: "sim".into(),
            proto: 1,
        };
        self.links.insert(link, engine);
        self.to_core(Event::EngineAttached { link, hello: Box::new(hello) });
    }

    fn reborn(&mut self, engine: usize) {
        let now = self.now;
        if self.engines[engine].alive {
            return;
        }
        // A connection that nobody closed dies with the host.
        if let Some(link) = self.engines[engine].link.take() {
            self.links.remove(&link);
            self.to_core(Event::LinkLost { link, why: "reset" });
        }
        self.engines[engine].reborn(now);
        self.redial(engine, Duration::from_millis(20));
    }

    fn make(&mut self, engine: usize) {
        self.after(TICK, Happening::Make { engine });
        let (now, rate, params) = (self.now, self.scenario.rate, self.params);
        let agent = &mut self.engines[engine];
        if !agent.alive || agent.session.is_none() {
            return;
        }
        let Some(mut tick) = agent.make(now, rate, params) else {
            return self.finish_drain(engine);
        };
        if self.lose_finishes_at.is_some_and(|(at, until)| at == engine && now < until) {
            SimEngine::lose_finishes(&mut tick);
            if let Some(kept) = self.engines[engine].unacked.back_mut() {
                *kept = tick.clone();
            }
        }
        if self.garble.take_if(|at| *at == engine).is_some() {
            garble(&mut tick);
            if let Some(kept) = self.engines[engine].unacked.back_mut() {
                *kept = tick.clone();
            }
        }
        self.send_tick(engine, tick);
        self.finish_drain(engine);
    }

    pub(crate) fn send_tick(&mut self, engine: usize, tick: pb::Tick) {
        let agent = &self.engines[engine];
        if let (true, true, Some(link), Some(session)) =
            (agent.net_up, agent.attached, agent.link, agent.session)
        {
            self.after(super::LATENCY, Happening::Tick { link, session, tick });
        }
    }

    fn resend(&mut self, engine: usize) {
        let ticks: Vec<_> = self.engines[engine].unacked.iter().cloned().collect();
        for tick in ticks {
            self.send_tick(engine, tick);
        }
    }

    pub(super) fn agent_got(&mut self, engine: usize, link: LinkId, message: ToAgent) {
        let agent = &mut self.engines[engine];
        if !agent.alive || agent.link != Some(link) {
            return;
        }
        if !agent.net_up {
            // A cut connection keeps what was sent until it is given up, or heals.
            return self
                .after(Duration::from_millis(200), Happening::ToAgent { engine, link, message });
        }
        match message {
            ToAgent::Welcome { session, acked, keep } => {
                if agent.session.replace(session) != Some(session) {
                    agent.live.clear();
                    agent.ends.clear();
                    agent.unacked.clear();
                    agent.next_tick = 1;
                    agent.drain = None;
                    agent.load = None;
                    agent.released = false;
                }
                agent.load = None;
                agent.live.retain(|sample, live| {
                    keep.iter().any(|held| held.sample == *sample && held.attempt == live.attempt)
                });
                agent.acked(acked);
                agent.attached = true;
                self.resend(engine);
            }
            ToAgent::Start(order, kept) => agent.start(&order, &kept),
            ToAgent::Stop { sample, attempt } => agent.stop(sample, attempt),
            ToAgent::Ack(seq) => agent.acked(seq),
            ToAgent::Load(order) => {
                agent.load = Some(LoadRun {
                    order: order.order,
                    version: order.version,
                    stage: LoadStage::Fetching,
                    on_running: order.on_running,
                    fails: false,
                });
                self.report_load(engine, LoadStage::Fetching);
                self.load_goes_on(engine, order.order);
            }
            ToAgent::CancelLoad(order) => {
                if agent.load.as_ref().is_some_and(|load| load.order == order) {
                    agent.load = None;
                }
            }
            ToAgent::Mode { order, mode, deadline } => self.mode(engine, order, mode, deadline),
            ToAgent::Closed { retry } => {
                agent.link = None;
                agent.attached = false;
                self.redial(engine, retry.unwrap_or(Duration::from_millis(300)));
            }
        }
    }

    fn load_goes_on(&mut self, engine: usize, order: OrderId) {
        let wait = Duration::from_millis(self.rng.range(5, 400));
        let incarnation = self.engines[engine].incarnation;
        self.after(wait, Happening::LoadStep { engine, incarnation, order });
    }

    fn load_step(&mut self, engine: usize, incarnation: u64, order: OrderId) {
        let agent = &mut self.engines[engine];
        if !agent.alive || agent.incarnation != incarnation {
            return;
        }
        let Some(load) = agent.load.as_mut().filter(|load| load.order == order) else { return };
        load.stage = match load.stage {
            LoadStage::Fetching => LoadStage::Staged,
            LoadStage::Staged => LoadStage::Quiescing,
            LoadStage::Quiescing if load.fails => LoadStage::Failed,
            LoadStage::Quiescing => LoadStage::Loading,
            LoadStage::Loading => LoadStage::Probing,
            _ => LoadStage::Active,
        };
        let (stage, version, on_running) = (load.stage, load.version, load.on_running);
        if stage == LoadStage::Quiescing && on_running == OnRunning::Abort {
            agent.end_all(Why::Aborted);
        }
        if stage == LoadStage::Active {
            agent.loaded = version;
        }
        self.report_load(engine, stage);
        if matches!(stage, LoadStage::Active | LoadStage::Failed) {
            self.engines[engine].load = None;
        } else {
            self.load_goes_on(engine, order);
        }
    }

    fn report_load(&mut self, engine: usize, stage: LoadStage) {
        let agent = &self.engines[engine];
        let (Some(load), Some(session)) = (&agent.load, agent.session) else { return };
        let report = LoadReport {
            order: load.order,
            version: load.version,
            stage,
            bytes: 0,
            error: if stage == LoadStage::Failed { "made to fail".into() } else { String::new() },
            probe: None,
            fetched_from: BTreeMap::new(),
            holds: stage == LoadStage::Active && self.scenario.seed.is_multiple_of(2),
        };
        self.control(engine, Event::LoadReported { session, report: Box::new(report) });
    }

    /// A control message: lost where the link is down (a real agent says it again at re-attach).
    fn control(&mut self, engine: usize, event: Event) {
        let agent = &self.engines[engine];
        if agent.net_up && agent.attached {
            self.to_core(event);
        }
    }

    fn mode(&mut self, engine: usize, order: OrderId, mode: ModeKind, deadline: Duration) {
        let now = self.now;
        let agent = &mut self.engines[engine];
        match mode {
            ModeKind::Drain => {
                agent.drain = Some((order, now + deadline));
                let incarnation = agent.incarnation;
                self.after(deadline, Happening::DrainOver { engine, incarnation, order });
            }
            ModeKind::ReleaseMemory => {
                agent.end_all(Why::Aborted);
                self.make_now(engine);
                self.engines[engine].released = true;
                self.mode_done(engine, order);
            }
            ModeKind::ResumeMemory => {
                agent.released = false;
                self.mode_done(engine, order);
            }
            ModeKind::Leave => {}
        }
    }

    fn make_now(&mut self, engine: usize) {
        let (now, rate, params) = (self.now, self.scenario.rate, self.params);
        if let Some(tick) = self.engines[engine].make(now, rate, params) {
            self.send_tick(engine, tick);
        }
    }

    fn mode_done(&mut self, engine: usize, order: OrderId) {
        let Some(session) = self.engines[engine].session else { return };
        let report =
            ModeReport { ok: true, drained: true, memory_released: true, error: String::new() };
        self.control(engine, Event::ModeReported { session, order, report });
    }

    fn drain_over(&mut self, engine: usize, incarnation: u64, order: OrderId) {
        let agent = &mut self.engines[engine];
        if agent.incarnation == incarnation && agent.drain.is_some_and(|(drain, _)| drain == order)
        {
            agent.end_all(Why::Aborted);
            self.make_now(engine);
            self.finish_drain(engine);
        }
    }

    /// Drained: say so and leave; the process comes back as a new one after a while.
    fn finish_drain(&mut self, engine: usize) {
        let agent = &self.engines[engine];
        let Some((order, _)) = agent.drain else { return };
        if !agent.alive
            || !agent.live.is_empty()
            || !agent.ends.is_empty()
            || !agent.attached
            || !agent.net_up
        {
            return;
        }
        self.mode_done(engine, order);
        self.engines[engine].alive = false;
        let back_in = Duration::from_millis(self.rng.range(100, 3_000));
        self.after(back_in, Happening::Reborn { engine });
    }

    // The trainer

    fn open_job(&mut self) {
        let resumes = self.trainer.phase == Phase::Down;
        let open = OpenJob {
            job: "sim".into(),
            epoch: self.trainer.epoch,
            model: ModelFacts::default(),
            convention: Convention::Tempered,
            staleness: self.scenario.staleness,
            on_running: self.scenario.on_running,
            on_trainer_lost: Duration::from_secs(60),
            resume: resumes.then_some(self.trainer.committed),
            seed: self.scenario.seed,
            rolling: self.scenario.rolling,
        };
        self.trainer.phase = Phase::Opening;
        let reply = self.ask(Waiting::Open);
        self.to_core(Event::JobOpened { open: Box::new(open), reply });
    }

    fn consume(&mut self, shard: u32) {
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
        self.to_core(Event::CreditGranted { consumer, bytes: 1 << 20, samples });
    }

    fn take(&mut self, consumer: ConsumerId, batch: &super::Batch, samples: &[usize]) {
        let Some(&shard) = self.trainer.consumers.get(&consumer) else { return };
        let seen = self.trainer.seen.get(&shard).copied().unwrap_or_default();
        // What came twice is acknowledged (and its credit given) twice, and taken once.
        if batch.seq > seen
            && let Err(what) = self.trainer.take(shard, batch, samples)
        {
            return self.fail(what);
        }
        let seq = batch.seq;
        self.to_core(Event::BatchAcked { consumer, seq });
        let (bytes, samples) = (1 << 20, samples.len() as u64);
        self.to_core(Event::CreditGranted { consumer, bytes, samples });
        self.advance();
    }

    /// Has the step come whole?
    fn advance(&mut self) {
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
            self.to_core(Event::BatchCommitted { consumer, seq });
        }
    }

    fn switch(&mut self, train: bool, step: u64) {
        let Some(session) = self.trainer.session else { return };
        let by = self.now + MODE_DEADLINE + Duration::from_secs(1);
        let what = if train { Waiting::Train { step, by } } else { Waiting::Generate { step, by } };
        let reply = self.ask(what);
        self.to_core(Event::ModeRequested { session, train, deadline: MODE_DEADLINE, reply });
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
            bytes: 1 << 20,
            directory: None,
        };
        let reply = self.ask(Waiting::Announce { version });
        self.to_core(Event::VersionAnnounced { publisher, announce: Box::new(announce), reply });
    }

    fn answered(&mut self, to: ReplyTo, answer: Answer) {
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
                self.to_core(Event::VersionSealed { publisher, version, reply });
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
            self.to_core(Event::EngineReported { session, engine, version, reply });
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
        self.to_core(Event::GroupsSubmitted {
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
            sampling: std::sync::Arc::new(Sampling {
                max_tokens: self.scenario.max_tokens,
                min_tokens: 0,
                temperature: 1.0,
                top_p: 1.0,
                top_k: 0,
                min_p: 0.0,
                stop_ids: vec![],
                stop_strings: vec![],
                ignore_eos: false,
                presence_penalty: 0.0,
                frequency_penalty: 0.0,
                repetition_penalty: 1.0,
                seed: None,
                restart_ok: false,
                extra: BTreeMap::new(),
            }),
            pin,
            priority: 0,
            deadline: None,
            meta: bytes::Bytes::new(),
            session: String::new(),
        }
    }
}

/// A token outside the vocabulary, where there is one to spoil.
fn garble(tick: &mut pb::Tick) {
    let mut ids: Vec<u32> = tokens::ids(&tick.tokens).collect();
    if let Some(last) = ids.last_mut() {
        *last = u32::MAX;
    }
    tick.tokens = tokens::encode_ids(&ids);
}
