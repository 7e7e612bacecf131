//! The core in virtual time: a script of events, the actions that follow, and nothing else.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use anabranch_proto::pb::{self, data_to_agent, end::Why, from_agent, load_state::Stage, to_agent};
use anabranch_proto::{Caps, LogprobsMode, Model, SampleId, SeedKeying, tokens};
use anabranch_runtime::Now;

use super::*;
use crate::engine::{AttemptId, Chunk, EngineInfo, Finish, Generate, LabelSpan, StreamError};

mod attach;
mod draining;
mod edges;
mod loading;
mod modes;
mod samples;

/// A core with its clock, and what its actions amounted to.
struct World {
    core: Core,
    now: Now,
    link: Option<LinkId>,
    hellos: Vec<pb::Hello>,
    generated: Vec<Generate>,
    aborted: Vec<AttemptId>,
    ticks: Vec<pb::Tick>,
    control: Vec<from_agent::Kind>,
    other: Vec<String>,
    exit: Option<ExitReason>,
}

fn info() -> EngineInfo {
    EngineInfo {
        kind: "test".into(),
        model: Model { vocab: 100, max_context: 64, ..Default::default() },
        caps: Caps {
            release_memory: true,
            ..Caps::new(SeedKeying::AbsolutePosition, vec![LogprobsMode::Tempered])
        },
        kv_tokens: 1000,
        max_running: 8,
        incremental: true,
        model_directory: Some(PathBuf::from("/model")),
        weight_label: "default".into(),
    }
}

fn welcome(session: u64) -> pb::Welcome {
    pb::Welcome { session, lease_ms: 3000, tick_ms: 20, manager_epoch: 1, ..Default::default() }
}

impl World {
    fn new(buffer_bytes: usize) -> World {
        let core = Core::new(CoreConfig {
            id: "e".into(),
            incarnation: 10,
            token: String::new(),
            labels: BTreeMap::new(),
            gpus: 1,
            addresses: Vec::new(),
            host: String::new(),
            weights_by_trainer: false,
            buffer_bytes,
        });
        World {
            core,
            now: Now::ZERO,
            link: None,
            hellos: Vec::new(),
            generated: Vec::new(),
            aborted: Vec::new(),
            ticks: Vec::new(),
            control: Vec::new(),
            other: Vec::new(),
            exit: None,
        }
    }

    /// Engine up, attached as session 1, data stream bound.
    fn ready() -> World {
        World::ready_with(1 << 20)
    }

    fn ready_with(buffer_bytes: usize) -> World {
        World::new(buffer_bytes).begun()
    }

    fn begun(mut self) -> World {
        let world = &mut self;
        world.handle(Event::EngineUp { info: Box::new(info()), probe: Some(probe(0.0)) });
        world.attach(welcome(1));
        self
    }

    fn attach(&mut self, welcome: pb::Welcome) {
        let link = self.link.expect("dialled");
        self.say(to_agent::Kind::Welcome(welcome));
        self.handle(Event::Bound { link });
    }

    fn handle(&mut self, event: Event) {
        self.core.handle(self.now, event);
        self.drain();
    }

    fn say(&mut self, kind: to_agent::Kind) {
        let link = self.link.expect("dialled");
        self.handle(Event::ManagerSaid { link, kind });
    }

    fn data(&mut self, kind: data_to_agent::Kind) {
        let link = self.link.expect("dialled");
        self.handle(Event::DataCame { link, kind });
    }

    fn ack(&mut self) {
        if let Some(seq) = self.ticks.last().map(|tick| tick.seq) {
            self.data(data_to_agent::Kind::Ack(pb::TickAck { seq }));
        }
    }

    fn pass(&mut self, time: Duration) {
        let until = self.now + time;
        while let Some(next) = self.core.next_timeout().filter(|next| *next <= until) {
            self.now = self.now.max(next);
            self.core.on_timeout(self.now);
            self.drain();
        }
        self.now = until;
    }

    fn drain(&mut self) {
        while let Some(action) = self.core.poll_action() {
            match action {
                Action::Dial { link, hello } => {
                    self.link = Some(link);
                    self.hellos.push(*hello);
                }
                Action::SendControl(kind) => self.control.push(*kind),
                Action::SendTick(tick) => self.ticks.push(*tick),
                Action::Generate(generate) => self.generated.push(*generate),
                Action::Abort { attempt, .. } => self.aborted.push(attempt),
                Action::Exit(exit) => self.exit = Some(exit),
                other => self.other.push(format!("{other:?}")),
            }
        }
    }

    fn start(&mut self, index: u32, attempt: u32) -> AttemptId {
        let before = self.generated.len();
        self.order_start(index, attempt);
        assert_eq!(self.generated.len(), before + 1, "it went to the engine");
        self.generated.last().expect("started").attempt
    }

    fn order_start(&mut self, index: u32, attempt: u32) {
        let ids = tokens::encode_ids(&[1, 2]);
        let digest = tokens::prompt_digest(&ids);
        self.data(data_to_agent::Kind::Prompt(pb::PromptPart { digest, at: 0, ids, last: true }));
        self.data(data_to_agent::Kind::Start(pb::Start {
            sample: Some(SampleId::new(1, index).into()),
            attempt,
            prompt: digest,
            sampling: Some(pb::Sampling { max_tokens: 40, ..Default::default() }),
            seed: 5,
            stop_ids: vec![9],
            ..Default::default()
        }));
    }

    fn tokens(&mut self, attempt: AttemptId, ids: &[u32]) {
        let chunk =
            Chunk { tokens: ids.to_vec(), logprobs: vec![-1.0; ids.len()], ..Default::default() };
        self.core.tokens(self.now, attempt, &chunk);
        self.drain();
    }

    fn finish(&mut self, attempt: AttemptId, finish: Finish) {
        let end = RequestEnd::Finished { finish, prompt_tokens: 2, cached_tokens: 0 };
        self.handle(Event::RequestEnded { attempt, end });
    }

    fn lose_link(&mut self) {
        let link = self.link.take().expect("a link");
        self.handle(Event::LinkLost { link, why: "test".into(), fatal: false });
    }

    /// (index, version number, tokens) of every segment sent so far, in order.
    fn segs(&self) -> Vec<(u32, u64, Vec<u32>)> {
        let of_tick = |tick: &pb::Tick| {
            let mut ids = tokens::ids(&tick.tokens);
            let seg = |seg: &pb::Seg| {
                let version = tick.versions[seg.version_ix as usize].number;
                (seg.index, version, ids.by_ref().take(seg.count as usize).collect())
            };
            tick.segs.iter().map(seg).collect::<Vec<_>>()
        };
        self.ticks.iter().flat_map(of_tick).collect()
    }

    fn ends(&self) -> Vec<(u32, Why, u32)> {
        let ends = self.ticks.iter().flat_map(|tick| &tick.ends);
        ends.map(|end| (end.sample.expect("sample").index, end.why(), end.at)).collect()
    }

    fn stages(&self) -> Vec<Stage> {
        let stage = |kind: &from_agent::Kind| match kind {
            from_agent::Kind::LoadState(state) => Some(state.stage()),
            _ => None,
        };
        self.control.iter().filter_map(stage).collect()
    }

    fn last_load(&self) -> pb::LoadState {
        let state = |kind: &from_agent::Kind| match kind {
            from_agent::Kind::LoadState(state) => Some(state.clone()),
            _ => None,
        };
        self.control.iter().rev().find_map(state).expect("a load state")
    }

    fn mode_done(&self) -> Option<pb::ModeDone> {
        self.control.iter().rev().find_map(|kind| match kind {
            from_agent::Kind::ModeDone(done) => Some(done.clone()),
            _ => None,
        })
    }

    fn order_load(&mut self, number: u64, on_running: pb::OnRunning, deadline_ms: u32) {
        self.say(to_agent::Kind::Load(pb::Load {
            order: number,
            version: Some(pb::Version { epoch: 1, number, root: vec![7; 32].into() }),
            on_running: on_running.into(),
            deadline_ms,
            ..Default::default()
        }));
    }

    fn staged(&mut self, order: u64) {
        let staged = StagedVersion {
            directory: PathBuf::from(format!("/shm/{order}")),
            bytes: 10,
            from: BTreeMap::new(),
            holds: false,
        };
        self.handle(Event::Fetched { order, result: Ok(staged) });
    }

    fn called(&mut self, call: Call, result: Result<(), String>) {
        self.handle(Event::Called { call, result });
    }

    /// Answers every call of a load, from quiet streams to the verdict.
    fn load_through(&mut self, logprob: f32) {
        self.called(Call::PauseForLoad, Ok(()));
        self.called(Call::Load, Ok(()));
        self.called(Call::ContinueAfterLoad, Ok(()));
        self.handle(Event::Probed { result: Ok(probe(logprob)) });
    }

    fn drain_order(&mut self, deadline_ms: u32) {
        let kind = pb::mode::Kind::Drain.into();
        let mode = pb::Mode { order: 50, kind, deadline_ms, why: "test".into() };
        self.say(to_agent::Kind::Mode(mode));
    }

    fn order_start_with_stop_string(&mut self, index: u32) {
        let ids = tokens::encode_ids(&[1, 2]);
        let digest = tokens::prompt_digest(&ids);
        self.data(data_to_agent::Kind::Prompt(pb::PromptPart { digest, at: 0, ids, last: true }));
        let stop_strings = vec!["end".to_owned()];
        let sampling = pb::Sampling { max_tokens: 40, stop_strings, ..Default::default() };
        self.data(data_to_agent::Kind::Start(pb::Start {
            sample: Some(SampleId::new(1, index).into()),
            attempt: 1,
            prompt: digest,
            sampling: Some(sampling),
            ..Default::default()
        }));
    }
}

fn probe(logprob: f32) -> ProbeResult {
    ProbeResult { ids: vec![1, 2], logprobs: vec![-1.0, logprob] }
}

const TICK: Duration = Duration::from_millis(20);
