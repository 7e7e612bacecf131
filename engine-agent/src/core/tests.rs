//! The core in virtual time: a script of events, the actions that follow, and nothing else.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use anabranch_proto::pb::{self, data_to_agent, end::Why, from_agent, load_state::Stage, to_agent};
use anabranch_proto::{SampleId, tokens};
use anabranch_runtime::Now;

use super::*;
use crate::engine::{Chunk, EngineInfo, Finish, Generate, LabelSpan, RunId, StreamError};

/// A core with its clock, and what its actions amounted to.
struct World {
    core: Core,
    now: Now,
    link: Option<LinkId>,
    hellos: Vec<pb::Hello>,
    generated: Vec<Generate>,
    aborted: Vec<RunId>,
    ticks: Vec<pb::Tick>,
    control: Vec<from_agent::Kind>,
    other: Vec<String>,
    exit: Option<Exit>,
}

fn info() -> EngineInfo {
    EngineInfo {
        kind: "test".into(),
        model: pb::Model { vocab: 100, max_context: 64, ..Default::default() },
        caps: pb::Caps {
            seed_keying: pb::caps::SeedKeying::AbsolutePosition.into(),
            logprob_conventions: vec![pb::Convention::Tempered.into()],
            release_memory: true,
            ..Default::default()
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
                Action::Abort { run, .. } => self.aborted.push(run),
                Action::Exit(exit) => self.exit = Some(exit),
                other => self.other.push(format!("{other:?}")),
            }
        }
    }

    fn start(&mut self, index: u32, attempt: u32) -> RunId {
        let before = self.generated.len();
        self.order_start(index, attempt);
        assert_eq!(self.generated.len(), before + 1, "it went to the engine");
        self.generated.last().expect("started").run
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

    fn tokens(&mut self, run: RunId, ids: &[u32]) {
        let chunk =
            Chunk { tokens: ids.to_vec(), logprobs: vec![-1.0; ids.len()], ..Default::default() };
        self.core.tokens(self.now, run, &chunk);
        self.drain();
    }

    fn finish(&mut self, run: RunId, finish: Finish) {
        let end = RunEnd::Finished { finish, prompt_tokens: 2, cached_tokens: 0 };
        self.handle(Event::RunEnded { run, end });
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
        let staged = Staged {
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

    /// From quiet streams to the verdict.
    fn load_through(&mut self, logprob: f32) {
        self.called(Call::Freeze, Ok(()));
        self.called(Call::Load, Ok(()));
        self.called(Call::Thaw, Ok(()));
        self.handle(Event::Probed { result: Ok(probe(logprob)) });
    }

    fn drain_order(&mut self, deadline_ms: u32) {
        let kind = pb::mode::Kind::Drain.into();
        let mode = pb::Mode { order: 50, kind, deadline_ms, why: "test".into() };
        self.say(to_agent::Kind::Mode(mode));
    }
}

fn probe(logprob: f32) -> ProbeResult {
    ProbeResult { ids: vec![1, 2], logprobs: vec![-1.0, logprob] }
}

const TICK: Duration = Duration::from_millis(20);

#[test]
fn tokens_go_out_once_a_tick_with_their_offsets_and_then_the_end() {
    let mut world = World::ready();
    let run = world.start(0, 1);
    world.tokens(run, &[3, 4]);
    assert!(world.ticks.is_empty(), "not before the tick");
    world.tokens(run, &[5]);
    world.pass(TICK);
    world.tokens(run, &[6]);
    world.finish(run, Finish::StopId);
    world.pass(TICK);
    assert_eq!(world.segs(), [(0, 0, vec![3, 4, 5]), (0, 0, vec![6])]);
    assert_eq!(world.ticks[1].segs[0].offset, 3);
    assert_eq!(world.ends(), [(0, Why::StopId, 4)]);
}

#[test]
fn a_re_attach_keeps_and_drops_exactly_and_sends_the_unacknowledged_again() {
    let mut world = World::ready();
    let (kept, dropped, ended) = (world.start(0, 1), world.start(1, 1), world.start(2, 1));
    world.tokens(kept, &[3]);
    world.pass(TICK);
    world.ack();
    world.tokens(ended, &[4, 4]);
    world.finish(ended, Finish::Length);
    world.pass(TICK);
    world.lose_link();
    world.tokens(kept, &[5]);
    world.tokens(dropped, &[6]);
    world.pass(Duration::from_secs(1));
    let hello = world.hellos.last().expect("dialled again").clone();
    assert_eq!(hello.resume_session, 1);
    let held: Vec<(u32, u32)> =
        hello.held.iter().map(|held| (held.sample.expect("s").index, held.upto)).collect();
    assert_eq!(held, [(0, 2), (1, 1), (2, 2)], "running ones, and one whose end may be lost");
    world.ticks.clear();
    let keep = vec![hello.held[0], hello.held[2]];
    world.attach(pb::Welcome { keep, acked_tick: 1, ..welcome(1) });
    assert_eq!(world.ticks.first().map(|tick| tick.seq), Some(2), "from the first unacknowledged");
    assert_eq!(world.ends(), [(2, Why::Length, 2)]);
    assert_eq!(world.aborted, [dropped]);
    world.tokens(dropped, &[7]);
    world.tokens(kept, &[8]);
    world.finish(dropped, Finish::Aborted);
    world.pass(TICK);
    assert_eq!(world.segs().last(), Some(&(0, 0, vec![8])), "nothing more of the dropped one");
}

#[test]
fn a_new_session_drops_everything_of_the_old_one() {
    let mut world = World::ready();
    let run = world.start(0, 1);
    world.tokens(run, &[3]);
    world.lose_link();
    world.pass(Duration::from_secs(1));
    world.attach(pb::Welcome { manager_epoch: 2, ..welcome(1) });
    assert_eq!(world.aborted, [run]);
    world.tokens(run, &[4]);
    world.finish(run, Finish::Aborted);
    world.pass(TICK);
    assert!(world.ticks.is_empty());
    let next = world.start(0, 2);
    world.tokens(next, &[5]);
    world.pass(TICK);
    assert_eq!(world.ticks[0].seq, 1, "ticks count from 1 in each session");
}

#[test]
fn a_silent_manager_is_left_after_a_lease_and_dialled_again_ever_more_slowly() {
    let mut world = World::ready();
    world.pass(Duration::from_millis(2900));
    assert_eq!(world.hellos.len(), 1);
    world.pass(Duration::from_millis(400));
    assert_eq!(world.hellos.len(), 2, "the lease is 3 s");
    for _ in 0..3 {
        world.lose_link();
        world.pass(Duration::from_millis(100));
        assert!(world.link.is_none(), "backs off");
        world.pass(Duration::from_secs(5));
        assert!(world.link.is_some(), "but not for ever");
    }
}

#[test]
fn beats_go_out_three_times_a_lease() {
    let mut world = World::ready();
    for _ in 0..3 {
        world.pass(Duration::from_secs(1));
        world.say(to_agent::Kind::BeatAck(pb::BeatAck { seq: 1 }));
    }
    let beats = world.control.iter().filter(|kind| matches!(kind, from_agent::Kind::Beat(_)));
    assert_eq!(beats.count(), 3);
}

#[test]
fn a_full_buffer_gives_back_the_newest_samples_and_takes_no_new_ones() {
    let mut world = World::ready_with(400);
    let runs: Vec<RunId> = (0..4).map(|index| world.start(index, 1)).collect();
    world.lose_link();
    for round in 0..8u32 {
        for run in &runs {
            world.tokens(*run, &[round + 10; 4]);
        }
        world.pass(TICK);
    }
    assert_eq!(world.aborted.first(), Some(&runs[3]), "the newest first");
    world.pass(Duration::from_secs(1));
    let held = world.hellos.last().expect("dialled").held.clone();
    world.attach(pb::Welcome { keep: held, ..welcome(1) });
    world.order_start(9, 1);
    world.pass(TICK);
    let ends = world.ends();
    assert!(ends.iter().any(|(index, why, _)| (*index, *why) == (3, Why::Busy)), "{ends:?}");
    assert!(ends.iter().any(|(index, why, _)| (*index, *why) == (9, Why::Busy)), "{ends:?}");
    world.ack();
    world.start(10, 1);
}

#[test]
fn a_drain_waits_for_every_terminal_chunk_and_every_acknowledgement() {
    let mut world = World::ready();
    let (quick, slow) = (world.start(0, 1), world.start(1, 1));
    world.drain_order(4000);
    world.order_start(2, 1);
    world.tokens(quick, &[3]);
    world.finish(quick, Finish::Length);
    world.pass(Duration::from_millis(2900));
    assert!(world.aborted.is_empty(), "samples may finish until shortly before the deadline");
    assert_eq!(world.ends(), [(2, Why::Busy, 0), (0, Why::Length, 1)]);
    world.say(to_agent::Kind::BeatAck(pb::BeatAck { seq: 1 }));
    world.pass(Duration::from_millis(200));
    assert_eq!(world.aborted, [slow]);
    world.tokens(slow, &[4, 4]);
    world.ack();
    assert_eq!((world.mode_done(), &world.exit), (None, &None), "its terminal chunk is not here");
    world.finish(slow, Finish::Aborted);
    assert_eq!(world.ends().last(), Some(&(1, Why::Aborted, 2)), "sent without waiting for a tick");
    assert_eq!(world.exit, None, "the last tick is not acknowledged");
    world.ack();
    assert!(world.mode_done().is_some_and(|done| done.drained && done.order == 50));
    assert_eq!(world.exit, Some(Exit::Drained));
}

#[test]
fn a_drain_whose_engine_is_stuck_ends_a_while_after_its_deadline() {
    let mut world = World::ready();
    world.start(0, 1);
    world.drain_order(1000);
    for _ in 0..6 {
        world.pass(Duration::from_secs(1));
        if world.exit.is_none() {
            world.say(to_agent::Kind::BeatAck(pb::BeatAck { seq: 1 }));
        }
    }
    assert!(matches!(world.exit, Some(Exit::DrainCut { running: 1, .. })), "{:?}", world.exit);
    assert!(world.mode_done().is_some_and(|done| !done.ok));
}

#[test]
fn a_sigterm_before_any_manager_was_found_just_ends() {
    let mut world = World::new(1 << 20);
    let within = Duration::from_secs(30);
    world.handle(Event::LeaveAsked { why: "SIGTERM".into(), within });
    assert_eq!(world.exit, Some(Exit::Drained));
}

#[test]
fn a_load_cuts_running_samples_and_continues_them_with_all_their_tokens() {
    let mut world = World::ready();
    let run = world.start(0, 1);
    world.tokens(run, &[3, 4]);
    world.order_load(1, pb::OnRunning::Continue, 0);
    world.tokens(run, &[5]);
    world.staged(1);
    assert_eq!(world.aborted, [run]);
    assert!(!world.other.iter().any(|action| action.contains("Freeze")), "it has not ended yet");
    world.tokens(run, &[6]);
    world.finish(run, Finish::Aborted);
    assert!(world.other.iter().any(|action| action.contains("Freeze")));
    world.load_through(-0.7);
    let again = world.generated.last().expect("continued").clone();
    assert_eq!((again.run, again.tail.as_slice(), again.max_tokens), (run, &[3, 4, 5, 6][..], 36));
    assert_ne!(again.rid, world.generated[0].rid);
    world.tokens(run, &[7]);
    world.finish(run, Finish::StopId);
    world.pass(TICK);
    assert_eq!(world.segs(), [(0, 0, vec![3, 4, 5, 6]), (0, 1, vec![7])]);
    assert_eq!(world.ends(), [(0, Why::StopId, 5)], "no end of the cut in between");
    use Stage::{Active, Fetching, Loading, Probing, Quiescing, Staged};
    assert_eq!(world.stages(), [Fetching, Staged, Quiescing, Loading, Probing, Active]);
    assert_eq!(world.last_load().probe.expect("probe").verdict(), pb::probe::Verdict::First);
}

#[test]
fn starts_that_come_during_a_load_run_after_it() {
    let mut world = World::ready();
    world.order_load(1, pb::OnRunning::Continue, 0);
    world.start(0, 1);
    world.staged(1);
    let before = world.generated.len();
    world.order_start(1, 1);
    assert_eq!(world.generated.len(), before, "held");
    let cut = world.aborted[0];
    world.finish(cut, Finish::Aborted);
    world.load_through(-0.7);
    assert_eq!(world.generated.len(), before + 2, "the held and the cut one");
}

#[test]
fn a_load_that_the_engine_refuses_leaves_the_old_version_serving() {
    let mut world = World::ready();
    let run = world.start(0, 1);
    world.order_load(1, pb::OnRunning::Continue, 0);
    world.staged(1);
    world.finish(run, Finish::Aborted);
    world.called(Call::Freeze, Ok(()));
    world.called(Call::Load, Err("400: no such file".into()));
    assert_ne!(world.last_load().stage(), Stage::Failed, "first the engine must go on");
    world.called(Call::Thaw, Ok(()));
    assert_eq!(world.last_load().stage(), Stage::Failed);
    assert!(world.last_load().error.contains("no such file"));
    world.tokens(run, &[3]);
    world.pass(TICK);
    assert_eq!(world.segs(), [(0, 0, vec![3])], "under the old version");
}

#[test]
fn a_fetch_that_fails_or_is_late_never_disturbs_a_sample() {
    let mut world = World::ready();
    let run = world.start(0, 1);
    world.order_load(1, pb::OnRunning::Abort, 0);
    world.handle(Event::Fetched { order: 1, result: Err("chunk 3 is wrong".into()) });
    assert_eq!(world.last_load().error, "chunk 3 is wrong");
    world.order_load(2, pb::OnRunning::Abort, 500);
    world.pass(Duration::from_millis(600));
    assert_eq!((world.last_load().order, world.last_load().stage()), (2, Stage::Failed));
    assert!(world.last_load().error.contains("500 ms"));
    world.staged(2);
    assert_eq!(world.last_load().stage(), Stage::Failed, "too late is too late");
    world.order_load(3, pb::OnRunning::Abort, 0);
    world.order_load(4, pb::OnRunning::Abort, 0);
    let superseded: Vec<u64> = world
        .control
        .iter()
        .filter_map(|kind| match kind {
            from_agent::Kind::LoadState(state) if state.error.contains("superseded") => {
                Some(state.order)
            }
            _ => None,
        })
        .collect();
    assert_eq!(superseded, [3]);
    assert!(world.aborted.is_empty());
    world.tokens(run, &[3]);
}

#[test]
fn a_probe_that_disagrees_brings_the_old_weights_back_and_no_token_of_the_new_ones_leaves() {
    let mut world = World::ready();
    let run = world.start(0, 1);
    // Not to be cut, so it is paused and goes on before the probe.
    world.order_start_with_stop_string(1);
    let paused = world.generated.last().expect("started").run;
    world.tokens(paused, &[3]);
    world.finish(run, Finish::Length);
    world.say(to_agent::Kind::Load(pb::Load {
        order: 1,
        version: Some(pb::Version { epoch: 1, number: 1, root: vec![7; 32].into() }),
        on_running: pb::OnRunning::Continue.into(),
        reference: Some(pb::Probe { ids: vec![1, 2], logprobs: vec![-1.0, -0.4], verdict: 0 }),
        ..Default::default()
    }));
    world.staged(1);
    world.called(Call::Freeze, Ok(()));
    world.called(Call::Load, Ok(()));
    world.tokens(paused, &[66]);
    world.called(Call::Thaw, Ok(()));
    world.tokens(paused, &[67]);
    world.handle(Event::Probed { result: Ok(probe(-0.7)) });
    assert!(
        world
            .other
            .iter()
            .any(|action| action.contains("LoadWeights") && action.contains("/model"))
    );
    world.called(Call::Load, Ok(()));
    world.called(Call::Thaw, Ok(()));
    assert_eq!(world.last_load().stage(), Stage::Failed);
    world.pass(TICK);
    assert_eq!(world.segs(), [(1, 0, vec![3])]);
    assert!(
        world.ends().contains(&(1, Why::Aborted, 1)),
        "continues elsewhere: {:?}",
        world.ends()
    );
    assert_eq!(world.exit, None);
}

#[test]
fn a_probe_within_the_tolerance_agrees_and_an_unchanged_one_is_inconclusive() {
    for (reference, logprob, wanted) in [
        (Some(-0.70004), -0.7, pb::probe::Verdict::Agrees),
        (None, 0.0, pb::probe::Verdict::Inconclusive),
        (None, -0.7, pb::probe::Verdict::First),
    ] {
        let mut world = World::ready();
        world.say(to_agent::Kind::Load(pb::Load {
            order: 1,
            version: Some(pb::Version { epoch: 1, number: 1, root: vec![7; 32].into() }),
            reference: reference.map(|logprob| pb::Probe {
                ids: vec![1, 2],
                logprobs: vec![-1.0, logprob],
                verdict: 0,
            }),
            ..Default::default()
        }));
        world.staged(1);
        world.load_through(logprob);
        assert_eq!(world.last_load().probe.expect("probe").verdict(), wanted);
    }
}

#[test]
fn the_engines_spans_place_a_boundary_that_a_pause_blurred() {
    let mut world = World::ready();
    world.order_start_with_stop_string(0);
    let run = world.generated.last().expect("started").run;
    world.tokens(run, &[3, 4]);
    world.order_load(1, pb::OnRunning::Continue, 0);
    world.staged(1);
    world.load_through(-0.7);
    let span = |label: &str, start, end| LabelSpan { label: label.into(), start, end };
    let chunk = Chunk {
        tokens: vec![5, 6, 7],
        logprobs: vec![-1.0; 3],
        spans: vec![span("default", 0, 3), span("v1@1", 3, 5)],
        finish: Some(Finish::Length),
        ..Default::default()
    };
    world.core.tokens(world.now, run, &chunk);
    world.pass(TICK);
    assert_eq!(world.segs(), [(0, 0, vec![3, 4, 5]), (0, 1, vec![6, 7])]);
    assert!(world.ticks.iter().flat_map(|tick| &tick.segs).all(|seg| !seg.inexact));
}

#[test]
fn tokens_of_weights_that_nobody_loaded_here_are_not_taken() {
    let mut world = World::ready();
    let run = world.start(0, 1);
    let mut chunk = Chunk { tokens: vec![3], logprobs: vec![-1.0], ..Default::default() };
    chunk.label = "somebody else's".into();
    assert_eq!(world.core.tokens(world.now, run, &chunk), Verdict::Drop);
    world.pass(TICK);
    assert!(world.segs().is_empty());
    assert_eq!(world.ends(), [(0, Why::Lost, 0)]);
    assert!(world.other.iter().any(|action| action.contains("CheckEngine")));
}

#[test]
fn a_dead_engine_loses_its_samples_and_the_next_life_is_a_new_session() {
    let mut world = World::ready();
    let run = world.start(0, 1);
    world.tokens(run, &[3]);
    world.order_load(1, pb::OnRunning::Continue, 0);
    world.handle(Event::EngineDown { why: "killed".into(), will_restart: true });
    assert_eq!(world.segs(), [(0, 0, vec![3])], "what it made is not lost");
    assert_eq!(world.ends(), [(0, Why::Lost, 1)]);
    assert_eq!(world.last_load().stage(), Stage::Failed);
    world.order_start(1, 1);
    world.pass(TICK);
    assert_eq!(world.ends().last(), Some(&(1, Why::Busy, 0)));
    assert_eq!(
        (world.ticks[0].ends.len(), world.ticks[1].ends.len()),
        (0, 1),
        "tokens, death, ends"
    );
    world.handle(Event::EngineUp { info: Box::new(info()), probe: None });
    assert_eq!(world.hellos.len(), 1, "the manager takes the rest first");
    world.ack();
    let hello = world.hellos.last().expect("dialled");
    assert_eq!((hello.resume_session, hello.engine.as_ref().expect("e").incarnation), (0, 11));
}

#[test]
fn an_engine_that_dies_while_the_link_is_down_is_spoken_for_in_its_own_session() {
    let mut world = World::ready();
    let run = world.start(0, 1);
    world.lose_link();
    world.tokens(run, &[3]);
    world.handle(Event::EngineDown { why: "killed".into(), will_restart: true });
    world.handle(Event::EngineUp { info: Box::new(info()), probe: None });
    world.pass(Duration::from_secs(1));
    let hello = world.hellos.last().expect("dialled").clone();
    let incarnation = |hello: &pb::Hello| hello.engine.as_ref().expect("e").incarnation;
    assert_eq!((hello.resume_session, incarnation(&hello), hello.kv_tokens), (1, 10, 1000));
    world.attach(pb::Welcome { keep: hello.held, ..welcome(1) });
    assert_eq!(world.segs(), [(0, 0, vec![3])]);
    assert!(world.control.iter().any(|kind| matches!(kind, from_agent::Kind::EngineDown(_))));
    world.order_start(1, 1);
    world.pass(TICK);
    assert_eq!(world.ends().last(), Some(&(1, Why::Busy, 0)), "not in the old session");
    world.ack();
    let hello = world.hellos.last().expect("dialled");
    assert_eq!((hello.resume_session, incarnation(hello)), (0, 11));
}

#[test]
fn memory_is_given_back_only_when_nothing_runs() {
    let mut world = World::ready();
    let run = world.start(0, 1);
    let kind = pb::mode::Kind::ReleaseMemory.into();
    world.say(to_agent::Kind::Mode(pb::Mode {
        order: 3,
        kind,
        deadline_ms: 1000,
        why: String::new(),
    }));
    assert_eq!(world.aborted, [run]);
    assert!(!world.other.iter().any(|action| action.contains("ReleaseMemory")));
    world.finish(run, Finish::Aborted);
    assert!(world.other.iter().any(|action| action.contains("ReleaseMemory")));
    world.called(Call::ReleaseMemory, Ok(()));
    let done = world.mode_done().expect("answered");
    assert!(done.ok && done.drained && done.memory_released);
    world.order_start(1, 1);
    world.pass(TICK);
    assert_eq!(world.ends().last(), Some(&(1, Why::Busy, 0)));
}

#[test]
fn an_engine_that_ignores_stop_ids_is_stopped_at_the_first_one() {
    let mut world = World::ready();
    let ids = tokens::encode_ids(&[1, 2]);
    let digest = tokens::prompt_digest(&ids);
    world.data(data_to_agent::Kind::Prompt(pb::PromptPart { digest, at: 0, ids, last: true }));
    let sampling =
        pb::Sampling { max_tokens: 40, min_tokens: 3, ignore_eos: true, ..Default::default() };
    world.data(data_to_agent::Kind::Start(pb::Start {
        sample: Some(SampleId::new(1, 0).into()),
        attempt: 1,
        prompt: digest,
        sampling: Some(sampling),
        stop_ids: vec![9],
        ..Default::default()
    }));
    let run = world.generated[0].run;
    world.tokens(run, &[9, 4]);
    world.tokens(run, &[5, 9, 6]);
    world.tokens(run, &[7]);
    world.pass(TICK);
    assert_eq!(world.segs(), [(0, 0, vec![9, 4, 5, 9])]);
    assert_eq!(world.ends(), [(0, Why::StopId, 4)]);
    assert_eq!(world.aborted, [run]);
}

#[test]
fn a_version_outside_the_samples_window_is_not_served() {
    let mut world = World::ready();
    let ids = tokens::encode_ids(&[1]);
    let digest = tokens::prompt_digest(&ids);
    world.data(data_to_agent::Kind::Prompt(pb::PromptPart { digest, at: 0, ids, last: true }));
    let version = |number| Some(pb::Version { epoch: 1, number, root: vec![7; 32].into() });
    world.data(data_to_agent::Kind::Start(pb::Start {
        sample: Some(SampleId::new(1, 0).into()),
        attempt: 1,
        prompt: digest,
        sampling: Some(pb::Sampling { max_tokens: 4, ..Default::default() }),
        min_version: version(3),
        ..Default::default()
    }));
    world.pass(TICK);
    assert_eq!(world.ends(), [(0, Why::Busy, 0)]);
    assert!(world.ticks[0].ends[0].matched.contains("needs v3@1"));
}

#[test]
fn tokens_of_an_engine_that_the_trainer_loads_carry_the_version_it_attested() {
    let mut world = World::new(1 << 20);
    world.core.config.weights_by_trainer = true;
    let mut world = world.begun();
    let ids = tokens::encode_ids(&[1, 2]);
    let digest = tokens::prompt_digest(&ids);
    world.data(data_to_agent::Kind::Prompt(pb::PromptPart { digest, at: 0, ids, last: true }));
    for (index, number) in [(0, 3), (1, 4)] {
        world.data(data_to_agent::Kind::Start(pb::Start {
            sample: Some(SampleId::new(1, index).into()),
            attempt: 1,
            prompt: digest,
            sampling: Some(pb::Sampling { max_tokens: 40, ..Default::default() }),
            min_version: Some(pb::Version { epoch: 1, number, root: vec![7; 32].into() }),
            ..Default::default()
        }));
        let run = world.generated.last().expect("it was started").run;
        world.tokens(run, &[5]);
    }
    world.pass(Duration::from_millis(20));
    assert_eq!(world.segs(), [(0, 3, vec![5]), (1, 4, vec![5])]);
}

#[test]
fn an_abort_that_nobody_asked_for_and_a_broken_stream_are_lost_samples() {
    let mut world = World::ready();
    let (aborted, broken) = (world.start(0, 1), world.start(1, 1));
    world.finish(aborted, Finish::Aborted);
    let error = StreamError::Broken { why: "reset".into() };
    world.handle(Event::RunEnded { run: broken, end: RunEnd::Failed(error) });
    world.pass(TICK);
    assert_eq!(world.ends(), [(0, Why::Lost, 0), (1, Why::Lost, 0)]);
    assert!(world.other.iter().any(|action| action.contains("CheckEngine")));
}

#[test]
fn a_newer_attempt_silences_the_older_one() {
    let mut world = World::ready();
    let old = world.start(0, 1);
    world.tokens(old, &[3]);
    let new = world.start(0, 2);
    assert_eq!(world.aborted, [old]);
    world.tokens(old, &[4]);
    world.finish(old, Finish::Aborted);
    world.tokens(new, &[5]);
    world.order_start(0, 1);
    world.pass(TICK);
    assert_eq!(world.segs(), [(0, 0, vec![3]), (0, 0, vec![5])]);
    assert_eq!(world.ticks[0].segs[1].attempt, 2);
    assert!(world.ends().is_empty());
}

impl World {
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
