use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use anabranch_proto::{Attempt, EngineId, Incarnation, SampleId, SessionId, Step, Version, tokens};
use anabranch_runtime::clock::Now;

use super::Core;
use super::config::CoreConfig;
use crate::action::{Action, Answer, Notice};
use crate::event::*;
use crate::ledger::{Fact, Finished};

mod feeding;
mod ledger;
mod senders;
mod trainers;
mod wave;

/// A core with one job, whose actions are collected.
struct Bench {
    core: Core,
    now: Now,
    next: u64,
    trainer: SessionId,
}

impl Bench {
    fn new() -> Self {
        let now = Now::from_millis(1);
        let core = Core::new(CoreConfig::default(), now);
        let mut bench = Self { core, now, next: 0, trainer: SessionId(0) };
        bench.trainer = bench.open();
        bench
    }

    /// A session of the job's trainer, or of another rank of it.
    fn open(&mut self) -> SessionId {
        let open = opening();
        let actions = self.tell(Event::JobOpened { open: Box::new(open), reply: ReplyTo(1) });
        let opened = actions.into_iter().find_map(|action| match action {
            Action::Reply { answer: Answer::Opened { session, .. }, .. } => Some(session),
            _ => None,
        });
        opened.expect("the job opens")
    }

    fn tell(&mut self, event: Event) -> Vec<Action> {
        self.core.handle(self.now, event);
        let actions = std::iter::from_fn(|| self.core.poll_action()).collect();
        self.core.check().expect("the books agree");
        actions
    }

    fn attach(&mut self, id: &str) -> Vec<Action> {
        self.attach_with(id, |_| {})
    }

    fn attach_with(&mut self, id: &str, change: impl FnOnce(&mut EngineHello)) -> Vec<Action> {
        self.next += 1;
        let mut hello = EngineHello {
            id: EngineId::new(id),
            incarnation: Incarnation(self.next),
            model: Model { vocab: 100, max_context: 100, eos_ids: vec![2], ..Default::default() },
            logprobs_modes: vec![LogprobsMode::Tempered],
            seed_keying: SeedKeying::AbsolutePosition,
            columns: vec![],
            release_memory: false,
            weights_by_trainer: false,
            kv_tokens: 1_000,
            max_running: 8,
            gpus: 1,
            labels: BTreeMap::new(),
            addresses: vec![],
            host: None,
            held: vec![],
            loaded: Version::base(0),
            resume: None,
            manager_epoch: 1,
            kind: "test".into(),
            proto: 1,
        };
        change(&mut hello);
        self.tell(Event::EngineAttached { link: LinkId(self.next), hello: Box::new(hello) })
    }

    fn submit(&mut self, key: &str, prompt: &[u32], max_tokens: u32) -> Vec<Action> {
        self.submit_with(key, prompt, Sampling::new(max_tokens))
    }

    fn submit_with(&mut self, key: &str, prompt: &[u32], sampling: Sampling) -> Vec<Action> {
        let group = NewGroup {
            key: key.into(),
            prompt: tokens::encode_ids(prompt),
            n: 1,
            sampling: Arc::new(sampling),
            pin: None,
            priority: 0,
            deadline: None,
            meta: Default::default(),
            session: String::new(),
        };
        let (session, reply) = (self.trainer, ReplyTo(2));
        let step = Step(0);
        self.tell(Event::GroupsSubmitted {
            session,
            step,
            is_final: false,
            groups: vec![group],
            reply,
        })
    }
}

fn opening() -> OpenJob {
    OpenJob {
        job: "job".into(),
        epoch: 0,
        model: Model::default(),
        logprobs_mode: LogprobsMode::Tempered,
        staleness: Staleness { max_lag: Some(0), on_exceed: OnExceed::Wait },
        on_running: OnRunning::Continue,
        on_trainer_lost: Duration::from_secs(600),
        resume: None,
        seed: 1,
        rolling: None,
        join: false,
    }
}

fn starts(actions: &[Action]) -> Vec<(SampleId, Attempt, SessionId)> {
    let start = |action: &Action| match action {
        Action::Start(order) => Some((order.sample, order.attempt, order.session)),
        _ => None,
    };
    actions.iter().filter_map(start).collect()
}

#[test]
fn a_sample_that_kills_engines_runs_alone_and_is_given_up_with_its_story() {
    let mut bench = Bench::new();
    let mut session = bench.attach("a").iter().find_map(welcomed).expect("welcome");
    let mut running = starts(&bench.submit("poison", &[5, 6], 10));
    let mut held = 0;
    let mut deaths = 0;
    while let Some((sample, _, at)) = running.pop() {
        assert_eq!(at, session);
        deaths += 1;
        assert!(deaths <= 4, "it walks through the fleet");
        let why = "the engine process died".to_owned();
        let mut actions = bench.tell(Event::EngineDied { session, why });
        bench.now = bench.now + Duration::from_secs(1);
        actions.extend(bench.attach("a"));
        // A reserved engine is free at once: the next event places it.
        actions.extend(bench.tell(Event::TimePassed { gap: Duration::ZERO }));
        held +=
            actions.iter().filter(|a| matches!(a, Action::Emit(Notice::SampleHeld { .. }))).count();
        session = actions.iter().rev().find_map(welcomed).expect("it attaches again");
        running = starts(&actions);
        let gone = |action: &Action| match action {
            Action::Emit(Notice::SampleAbandoned { sample: named, why, .. }) => {
                assert_eq!(*named, sample.to_string());
                assert!(why.contains("4 engines died under it"), "{why}");
                true
            }
            _ => false,
        };
        assert_eq!(actions.iter().any(gone), deaths == 4);
    }
    assert_eq!((deaths, held), (4, 1));
    assert_eq!(starts(&bench.submit("harmless", &[5], 10)).len(), 1, "the fleet serves on");
}

#[test]
fn samples_that_may_be_poison_are_tried_one_at_a_time_and_a_token_clears_them() {
    let mut bench = Bench::new();
    let mut running = Vec::new();
    let mut session = bench.attach("a").iter().find_map(welcomed).expect("welcome");
    for key in ["k", "l", "m"] {
        running.extend(starts(&bench.submit(key, &[5], 10)));
    }
    for _ in 0..2 {
        assert_eq!(running.len(), 3);
        bench.tell(Event::EngineDied { session, why: "it crashed".into() });
        let actions = bench.attach("a");
        session = actions.iter().find_map(welcomed).expect("welcome");
        running = starts(&actions);
        running.extend(starts(&bench.tell(Event::TimePassed { gap: Duration::ZERO })));
    }
    bench.attach("b");
    bench.tell(Event::TimePassed { gap: Duration::ZERO });
    assert_eq!(running.len(), 1, "all three may be poison now");
    assert_eq!(starts(&bench.submit("harmless", &[5], 10)).len(), 1, "the other engine serves all");
    let (sample, attempt, session) = running[0];
    let facts = vec![Fact::Grew { sample, attempt, kept: 1, oldest: 0 }];
    let mut next = starts(&bench.tell(Event::FactsFound { session, facts }));
    next.extend(starts(&bench.tell(Event::TimePassed { gap: Duration::ZERO })));
    assert!(next.iter().all(|(other, ..)| *other != sample));
    assert!(bench.core.fleet.reserves().iter().all(|(held, _)| *held != sample), "it is cleared");
}

#[test]
fn another_job_may_come_once_the_trainer_of_the_first_is_lost() {
    let mut bench = Bench::new();
    let open = || OpenJob { job: "other".into(), ..opening() };
    let tell = |bench: &mut Bench| {
        let open = Box::new(open());
        format!("{:?}", bench.tell(Event::JobOpened { open, reply: ReplyTo(1) }))
    };
    assert!(tell(&mut bench).contains("this manager runs job job"));
    bench.now = bench.now + Duration::from_secs(601);
    bench.tell(Event::TimePassed { gap: Duration::ZERO });
    assert!(tell(&mut bench).contains("Opened"));
}

#[test]
fn settings_that_differ_are_refused_unless_the_trainer_joins_or_a_tool_was_there_first() {
    let mut bench = Bench::new();
    let open = |bench: &mut Bench, epoch, seed, join| {
        let open = Box::new(OpenJob { epoch, seed, join, ..opening() });
        format!("{:?}", bench.tell(Event::JobOpened { open, reply: ReplyTo(1) }))
    };
    let refused = open(&mut bench, 0, 2, false);
    assert!(refused.contains("seed: the job has 1, this trainer asks for 2"), "{refused}");
    let open_raw = Box::new(OpenJob { join: true, logprobs_mode: LogprobsMode::Raw, ..opening() });
    let joined = bench.tell(Event::JobOpened { open: open_raw, reply: ReplyTo(1) });
    let mode = joined.iter().find_map(|action| match action {
        Action::Reply { answer: Answer::Opened { logprobs_mode, .. }, .. } => Some(*logprobs_mode),
        _ => None,
    });
    assert_eq!(mode, Some(LogprobsMode::Tempered), "agents are told the job's own");
    assert!(open(&mut bench, 0, 2, true).contains("Opened"));
    assert_eq!(bench.core.job.settings().expect("open").seed, 1);

    assert!(open(&mut bench, 1, 5, true).contains("Opened"), "a tool opens the next epoch");
    assert!(open(&mut bench, 1, 2, false).contains("Opened"), "the trainer says what holds");
    assert_eq!(bench.core.job.settings().expect("open").seed, 2);
    assert!(open(&mut bench, 1, 5, false).contains("other settings"));
}

fn welcomed(action: &Action) -> Option<SessionId> {
    match action {
        Action::Welcome { session, .. } => Some(*session),
        _ => None,
    }
}

#[test]
fn what_the_model_cannot_take_is_refused_in_words() {
    let mut bench = Bench::new();
    bench.attach("a");
    for (prompt, max_tokens, says) in [
        (&[][..], 10, "the prompt is empty"),
        (&[5, 100], 10, "token 100 at position 1 is outside the model's vocabulary of 100"),
        (
            &[5; 95],
            10,
            "prompt of 95 tokens + max_tokens 10 is more than the model's context of 100",
        ),
    ] {
        let actions = bench.submit("bad", prompt, max_tokens);
        let said = format!("{actions:?}");
        assert!(said.contains(says), "{said}");
        assert!(starts(&actions).is_empty());
    }
    assert_eq!(starts(&bench.submit("bad", &[5], 10)).len(), 1, "a refused key may be used again");
}

#[test]
fn a_key_is_accepted_once_however_often_it_is_sent() {
    let mut bench = Bench::new();
    bench.attach("a");
    assert_eq!(starts(&bench.submit("k", &[5], 10)).len(), 1);
    let again = bench.submit("k", &[5], 10);
    assert!(starts(&again).is_empty());
    assert!(format!("{again:?}").contains("Duplicate"));
}

#[test]
fn a_version_in_files_outlives_its_trainer_and_is_taken_up_again() {
    for (addresses, directory) in [
        (vec!["10.0.0.1:7000".to_owned(), "file:/shared".to_owned()], None),
        (vec![], Some("/shared/step-1".to_owned())),
        (vec!["10.0.0.1:7000".to_owned()], None),
    ] {
        let mut bench = Bench::new();
        let version = Version { epoch: 0, number: 1, root: anabranch_proto::Root([1; 32]) };
        let in_files = directory.is_some() || addresses.len() > 1;
        let announce = |bench: &Bench| {
            let (addresses, directory) = (addresses.clone(), directory.clone());
            let session = bench.trainer;
            Box::new(Announce {
                session,
                version,
                addresses,
                dials: false,
                bytes: 1,
                directory,
                sender: None,
            })
        };
        let (publisher, reply) = (PublisherId(1), ReplyTo(3));
        let told = announce(&bench);
        bench.tell(Event::VersionAnnounced { publisher, announce: told, reply });
        bench.tell(Event::VersionSealed { publisher, version, reply });
        bench.tell(Event::PublisherLost { publisher });
        let attached = bench.attach("late");
        let order = attached.iter().find_map(|action| match action {
            Action::OrderLoad(order) => Some(order),
            _ => None,
        });
        assert_eq!(order.is_some(), in_files);
        if let Some(order) = order {
            assert_eq!(order.directory, directory);
            let left: Vec<_> = order.sources.iter().flat_map(|s| s.addresses.clone()).collect();
            assert!(left.iter().all(|addr| addr == "file:/shared"), "{left:?}");
        }
        // Its trainer's link is back: the same version is no step back.
        let (publisher, told) = (PublisherId(2), announce(&bench));
        let again = bench.tell(Event::VersionAnnounced { publisher, announce: told, reply });
        let done = |a: &Action| matches!(a, Action::Reply { answer: Answer::Done, .. });
        assert!(again.iter().any(done), "{again:?}");
    }
}

#[test]
fn a_version_waits_for_samples_whose_first_tokens_may_be_on_their_way() {
    let mut bench = Bench::new();
    let session = bench.attach("a").iter().find_map(welcomed).expect("welcome");
    let (sample, attempt, _) = starts(&bench.submit("k", &[5], 10))[0];
    let version = Version { epoch: 0, number: 1, root: anabranch_proto::Root([1; 32]) };
    let announce = Announce {
        session: bench.trainer,
        version,
        addresses: vec!["10.0.0.1:7000".into()],
        dials: false,
        bytes: 1,
        directory: None,
        sender: None,
    };
    let publisher = PublisherId(1);
    let announce = Box::new(announce);
    bench.tell(Event::VersionAnnounced { publisher, announce, reply: ReplyTo(3) });
    let sealed = bench.tell(Event::VersionSealed { publisher, version, reply: ReplyTo(4) });
    let becomes_current = |actions: &[Action]| {
        actions.iter().any(|a| matches!(a, Action::Emit(Notice::VersionCurrent { .. })))
    };
    assert!(!becomes_current(&sealed), "the sample runs under the version before");
    let how = Finished::Length;
    let fact = Fact::Finished { sample, attempt, kept: 10, oldest: 0, how, running: false };
    assert!(becomes_current(&bench.tell(Event::FactsFound { session, facts: vec![fact] })));
}

#[test]
fn a_quarantined_engine_stays_away_for_its_time_unless_a_person_removes_it() {
    for removed in [false, true] {
        let mut bench = Bench::new();
        let mut session = SessionId(0);
        for _ in 0..CoreConfig::default().quarantine_deaths {
            session = bench.attach("a").iter().find_map(welcomed).expect("welcome");
            bench.tell(Event::EngineDied { session, why: "it crashed".into() });
        }
        // Its agent says it once more, late.
        bench.tell(Event::EngineDied { session, why: "it crashed".into() });
        if removed {
            let (engine, reply) = (EngineId::new("a"), ReplyTo(9));
            bench.tell(Event::RemoveRequested { engine, reply });
        }
        assert_eq!(bench.attach("a").iter().any(|a| welcomed(a).is_some()), removed);
        bench.now = bench.now + Duration::from_secs(11);
        bench.tell(Event::TimePassed { gap: Duration::ZERO });
        assert!(bench.attach("a").iter().any(|a| welcomed(a).is_some()));
    }
}
