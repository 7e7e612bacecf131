//! Actions of the agents: dial, generate, load, drain.

use std::collections::BTreeMap;
use std::time::Duration;

use anabranch_manager::action::ModeKind;
use anabranch_manager::event::{
    EngineHello, Event, LinkId, LoadReport, LoadStage, LogprobsMode, ModeReport, Model, OnRunning,
    SeedKeying,
};
use anabranch_proto::pb::end::Why;
use anabranch_proto::{EngineId, Incarnation, OrderId, pb, tokens};

use super::{Happening, TICK, ToAgent, World};
use crate::fleet::{LoadRun, OfTrainer, SimEngine};

impl World {
    pub(super) fn beats(&mut self) {
        for engine in 0..self.engines.len() {
            let agent = &self.engines[engine];
            if let (true, true, true, Some(session)) =
                (agent.alive, agent.net_up, agent.attached, agent.session)
            {
                let tokens = self.made.remove(&session).unwrap_or_default();
                self.post(Event::EngineHeard { session, tokens });
                self.post(Event::EngineBeat { session, running: 0, waiting: 0, kv_used: 0.0 });
            }
        }
        if self.trainer.session.is_some() {
            self.post(Event::TrainerHeard);
        }
        self.after(Duration::from_millis(900), Happening::Beats);
    }

    pub(crate) fn redial(&mut self, engine: usize, wait: Duration) {
        self.after(wait, Happening::Redial { engine });
    }

    /// Cuts the connection on both sides; `heard`: the manager notices at once.
    pub(crate) fn break_link(&mut self, engine: usize, heard: bool) {
        let agent = &mut self.engines[engine];
        agent.attached = false;
        let Some(link) = agent.link.take() else { return };
        self.links.remove(&link);
        if heard {
            self.post(Event::LinkLost { link, why: "reset" });
        }
    }

    pub(super) fn dial(&mut self, engine: usize) {
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
        let hello = self.hello(engine);
        self.links.insert(link, engine);
        self.post(Event::EngineAttached { link, hello: Box::new(hello) });
    }

    /// Dials as a life before the first that the manager saw, which is refused.
    pub(crate) fn dial_as_ghost(&mut self, engine: usize) {
        if self.engines[engine].session.is_none() {
            return;
        }
        self.next += 1;
        let link = LinkId(self.next);
        let hello = EngineHello { incarnation: Incarnation(0), ..self.hello(engine) };
        self.post(Event::EngineAttached { link, hello: Box::new(hello) });
    }

    fn hello(&self, engine: usize) -> EngineHello {
        let agent = &self.engines[engine];
        EngineHello {
            id: EngineId::new(&agent.name),
            incarnation: Incarnation(agent.incarnation),
            model: Model {
                id: "synthetic".into(),
                tokenizer_digest: String::new(),
                vocab: self.params.vocab,
                max_context: 4096,
                eos_ids: vec![self.params.eos_id],
                ..Model::default()
            },
            logprobs_modes: vec![LogprobsMode::Tempered],
            seed_keying: SeedKeying::AbsolutePosition,
            columns: vec![],
            release_memory: true,
            weights_by_trainer: agent.by_trainer(),
            kv_tokens: 8_000,
            max_running: 24,
            gpus: 1,
            labels: match agent.of_trainer {
                OfTrainer::Nothing => BTreeMap::new(),
                _ => BTreeMap::from([("colocated".into(), "true".into())]),
            },
            addresses: vec!["10.0.0.1:9000".into()],
            host: self.scenario.fleet.shares_hosts.then(|| format!("h{}", engine / 2)),
            held: agent.held(),
            loaded: agent.loaded,
            resume: agent.session,
            manager_epoch: 1,
            kind: if agent.relay { "relay".into() } else { "sim".into() },
            proto: 1,
        }
    }

    pub(super) fn reborn(&mut self, engine: usize) {
        let now = self.now;
        if self.engines[engine].alive {
            return;
        }
        // A connection that nobody closed dies with the host.
        if let Some(link) = self.engines[engine].link.take() {
            self.links.remove(&link);
            self.post(Event::LinkLost { link, why: "reset" });
        }
        self.engines[engine].reborn(now);
        self.redial(engine, Duration::from_millis(20));
    }

    pub(super) fn make(&mut self, engine: usize) {
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

    pub(super) fn resend(&mut self, engine: usize) {
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
                agent.end_load();
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
                    stuck: false,
                });
                self.report_load(engine, LoadStage::Fetching);
                self.load_goes_on(engine, order.order);
            }
            ToAgent::CancelLoad(order) => {
                if agent.load.as_ref().is_some_and(|load| load.order == order) {
                    agent.end_load();
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

    pub(super) fn load_step(&mut self, engine: usize, incarnation: u64, order: OrderId) {
        let agent = &mut self.engines[engine];
        if !agent.alive || agent.incarnation != incarnation {
            return;
        }
        let busy = agent.is_busy();
        let Some(load) = agent.load.as_mut().filter(|load| load.order == order) else { return };
        if load.stuck {
            return;
        }
        if busy {
            return self.load_goes_on(engine, order);
        }
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
            self.engines[engine].end_load();
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
            holds: stage == LoadStage::Active && (agent.relay || self.scenario.fleet.holds),
            ingress: 0,
            egress: 0,
            served: 0,
        };
        self.control(engine, Event::LoadReported { session, report: Box::new(report) });
    }

    /// Sends a control message, which is lost if the link is down (a real agent repeats it when it attaches again).
    fn control(&mut self, engine: usize, event: Event) {
        let agent = &self.engines[engine];
        if agent.net_up && agent.attached {
            self.post(event);
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
            // The link is closed after it.
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

    pub(super) fn drain_over(&mut self, engine: usize, incarnation: u64, order: OrderId) {
        let agent = &mut self.engines[engine];
        if agent.incarnation == incarnation && agent.drain.is_some_and(|(drain, _)| drain == order)
        {
            agent.end_all(Why::Aborted);
            self.make_now(engine);
            self.finish_drain(engine);
        }
    }

    /// Reports the end of the drain and leaves; the process comes back as a new one after a while.
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
}

/// Puts a token outside the vocabulary into a tick, if it has a token.
fn garble(tick: &mut pb::Tick) {
    let mut ids: Vec<u32> = tokens::ids(&tick.tokens).collect();
    if let Some(last) = ids.last_mut() {
        *last = u32::MAX;
    }
    tick.tokens = tokens::encode_ids(&ids);
}
