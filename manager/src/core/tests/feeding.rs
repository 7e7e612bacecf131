//! Sources that engines are told to fetch from.

use std::collections::BTreeSet;

use super::*;
use crate::action::{Holder, LoadOrder};

const MIB: u64 = 1 << 20;

struct Rollout {
    bench: Bench,
    sessions: BTreeMap<String, SessionId>,
    number: u64,
}

impl Rollout {
    fn new(engines: usize) -> Self {
        let mut rollout = Self { bench: Bench::new(), sessions: BTreeMap::new(), number: 0 };
        for at in 0..engines {
            rollout.join(&format!("e{at}"), |_| {});
        }
        rollout
    }

    fn join(&mut self, id: &str, change: impl FnOnce(&mut EngineHello)) -> Vec<LoadOrder> {
        let addresses = vec![format!("{id}:7000")];
        let actions = self.bench.attach_with(id, |hello| {
            hello.addresses = addresses;
            change(hello);
        });
        let session = actions.iter().find_map(welcomed).expect("welcome");
        self.sessions.insert(id.to_owned(), session);
        orders(actions)
    }

    /// The next version, sealed.
    fn publish(&mut self) -> Vec<LoadOrder> {
        orders(self.publish_with(|_| {}))
    }

    fn publish_with(&mut self, change: impl FnOnce(&mut Announce)) -> Vec<Action> {
        self.number += 1;
        let version = self.version();
        let mut announce = Announce {
            session: self.bench.trainer,
            version,
            addresses: vec!["trainer:7000".into()],
            dials: false,
            bytes: 512 * MIB,
            directory: None,
            sender: None,
        };
        change(&mut announce);
        let (publisher, announce) = (PublisherId(self.number), Box::new(announce));
        self.bench.tell(Event::VersionAnnounced { publisher, announce, reply: ReplyTo(3) });
        self.bench.tell(Event::VersionSealed { publisher, version, reply: ReplyTo(4) })
    }

    fn version(&self) -> Version {
        let root = anabranch_proto::Root([self.number as u8; 32]);
        Version { epoch: 0, number: self.number, root }
    }

    fn report(&mut self, order: &LoadOrder, change: impl FnOnce(&mut LoadReport)) -> Vec<Action> {
        let mut report = LoadReport {
            order: order.order,
            version: order.version,
            stage: LoadStage::Staged,
            bytes: order.bytes,
            error: String::new(),
            probe: None,
            fetched_from: BTreeMap::new(),
            holds: true,
            ingress: 0,
            egress: 0,
            served: 0,
        };
        change(&mut report);
        let session = order.session;
        self.bench.tell(Event::LoadReported { session, report: Box::new(report) })
    }

    /// Fetched at `rate` and active.
    fn loaded(&mut self, order: &LoadOrder, rate: u64) {
        self.report(order, |report| report.ingress = rate);
        self.report(order, |report| report.stage = LoadStage::Active);
    }

    fn engine(&self, id: &str) -> anabranch_views::EngineView {
        let state = self.bench.core.state(self.bench.now);
        let found = state.engines.into_iter().rev().find(|engine| engine.id == id);
        found.expect("attached once")
    }
}

fn orders(actions: Vec<Action>) -> Vec<LoadOrder> {
    let order = |action| match action {
        Action::OrderLoad(order) => Some(*order),
        _ => None,
    };
    actions.into_iter().filter_map(order).collect()
}

/// The engines of a stripe from the trainer down.
fn chain(orders: &[LoadOrder], stripe: u32) -> Vec<String> {
    let parent = |order: &LoadOrder| {
        order.sources.iter().find(|s| s.stripes.contains(&stripe)).map(|s| s.name.clone())
    };
    let mut chain = vec!["trainer".to_owned()];
    while let Some(next) = orders.iter().find(|order| parent(order).as_ref() == chain.last()) {
        chain.push(next.receiver.to_string());
    }
    chain
}

fn names(sources: &[Holder]) -> Vec<&str> {
    sources.iter().map(|source| source.name.as_str()).collect()
}

#[test]
fn a_new_version_goes_down_two_chains_of_all_engines_and_once_out_of_the_trainer() {
    let mut rollout = Rollout::new(8);
    let orders = rollout.publish();
    assert_eq!(orders.len(), 8);
    let chains = [chain(&orders, 0), chain(&orders, 1)];
    for chain in &chains {
        assert_eq!(chain.iter().collect::<BTreeSet<_>>().len(), 9, "{chains:?}");
    }
    assert_ne!(chains[0], chains[1]);
    let order = &orders[3];
    assert_eq!((order.stripe_count, order.streams), (2, 2));
    let last = order.sources.last().expect("sources");
    assert_eq!((last.name.as_str(), last.fallback_for.as_slice()), ("trainer", &[0, 1][..]));
    let view = rollout.engine(order.receiver.as_str());
    assert_eq!(view.load.expect("ordered").parents, names(&order.sources[..2]));
}

#[test]
fn only_agents_of_its_host_are_told_where_its_memory_can_be_had() {
    let mut rollout = Rollout::new(0);
    for (id, host) in [("a1", "a"), ("a2", "a"), ("b1", "b")] {
        rollout.join(id, |hello| {
            hello.host = Some(host.to_owned());
            hello.addresses.insert(0, format!("shm:/dev/shm/{id}/socket"));
        });
    }
    let orders = rollout.publish();
    let addresses = |receiver: &str, source: &str| {
        let order = orders.iter().find(|order| order.receiver.as_str() == receiver);
        let sources = &order.expect("an order for each").sources;
        sources.iter().find(|s| s.name == source).map(|s| s.addresses.clone())
    };
    let near = ["shm:/dev/shm/a1/socket", "a1:7000"].map(str::to_owned).to_vec();
    assert_eq!(addresses("a2", "a1"), Some(near));
    assert_eq!(addresses("b1", "a1"), Some(vec!["a1:7000".to_owned()]));
    assert_eq!(addresses("b1", "a2"), None, "it stands in no chain");
}

#[test]
fn a_late_joiner_is_fed_by_those_that_have_it_and_its_place_is_shown_afterwards() {
    let mut rollout = Rollout::new(5);
    for order in rollout.publish() {
        rollout.loaded(&order, 0);
    }
    let orders = rollout.join("late", |_| {});
    let [order] = &orders[..] else { panic!("{orders:?}") };
    assert_eq!(order.stripe_count, 4);
    assert_eq!(names(&order.sources), ["e0", "e1", "e2", "e3", "e4", "trainer"]);
    assert!(order.sources[5].stripes.is_empty());
    let from = BTreeMap::from([("e0".to_owned(), 200 * MIB), ("e1".to_owned(), 56 * MIB)]);
    rollout.report(order, |report| report.fetched_from = from.clone());
    rollout.report(order, |report| report.stage = LoadStage::Active);
    let state = rollout.bench.core.state(rollout.bench.now);
    let shown = &state.versions[0].engines["late"];
    assert_eq!(shown.fetched_from, from);
    assert_eq!(shown.parents, ["e0", "e1", "e2", "e3"]);
}

#[test]
fn after_a_relay_died_a_new_order_is_planned_with_what_lives() {
    let mut rollout = Rollout::new(4);
    let orders = rollout.publish();
    let relay = rollout.sessions["e1"];
    let actions = rollout.bench.tell(Event::EngineDied { session: relay, why: "killed".into() });
    assert!(self::orders(actions).is_empty(), "its children find another parent by themselves");
    let failed = orders.iter().find(|order| order.receiver.as_str() == "e2").expect("ordered");
    rollout.report(failed, |report| report.stage = LoadStage::Failed);
    rollout.bench.now = rollout.bench.now + Duration::from_secs(2);
    let again = self::orders(rollout.bench.tell(Event::TimePassed { gap: Duration::ZERO }));
    let [again] = &again[..] else { panic!("{again:?}") };
    assert_eq!(again.receiver.as_str(), "e2");
    assert!(!names(&again.sources).contains(&"e1"), "{:?}", again.sources);
}

#[test]
fn a_slow_host_stands_at_the_ends_from_the_next_version_on_and_a_restart_clears_it() {
    let mut rollout = Rollout::new(4);
    let slow_and_below = |order: &LoadOrder| order.receiver.as_str() >= "e1";
    for order in rollout.publish() {
        // Behind e1, nobody could get more than it did.
        rollout.loaded(&order, if slow_and_below(&order) { 10 * MIB } else { 100 * MIB });
    }
    assert_eq!(rollout.engine("e1").ingress, Some(10 * MIB));
    let orders = rollout.publish();
    for stripe in 0..orders[0].stripe_count {
        assert_eq!(chain(&orders, stripe).last().map(String::as_str), Some("e1"), "{orders:?}");
    }
    rollout.join("e1", |_| {});
    assert_eq!(rollout.engine("e1").ingress, None, "a new life may be on another machine");
}

#[test]
fn a_label_or_a_notice_makes_an_engine_preemptible_for_good() {
    let mut rollout = Rollout::new(1);
    let session = rollout.sessions["e0"];
    let within = Duration::from_secs(30);
    rollout.bench.tell(Event::PreemptionNoticed { session, within, why: "spot".into() });
    rollout.join("e0", |_| {});
    rollout.join("spot", |hello| {
        hello.labels.insert("spot".into(), "true".into());
    });
    rollout.join("owned", |_| {});
    let preemptible = ["e0", "spot", "owned"].map(|id| rollout.engine(id).preemptible);
    assert_eq!(preemptible, [true, true, false]);
    let orders = rollout.publish();
    assert_eq!(chain(&orders, 0)[1], "owned");
}

#[test]
fn what_was_tried_is_shown_until_a_load_succeeds() {
    let mut rollout = Rollout::new(0);
    rollout.publish();
    let orders = rollout.join("e0", |_| {});
    let story = "no path to any holder of v1: trainer at trainer:7000: connection refused";
    let told = rollout.report(&orders[0], |report| {
        report.stage = LoadStage::Failed;
        report.holds = false;
        report.error = story.into();
    });
    let noticed = |action: &Action| matches!(action, Action::Emit(Notice::LoadStage { error, .. }) if error == story);
    assert!(told.iter().any(noticed), "{told:?}");
    let view = rollout.engine("e0");
    assert_eq!(view.load_error, story);
    assert!(matches!(view.state, anabranch_views::EngineState::Syncing { .. }), "{:?}", view.state);
    rollout.bench.now = rollout.bench.now + Duration::from_secs(2);
    let again = self::orders(rollout.bench.tell(Event::TimePassed { gap: Duration::ZERO }));
    assert_eq!(rollout.engine("e0").load_error, story, "an order is no success");
    rollout.loaded(&again[0], 0);
    assert_eq!(rollout.engine("e0").load_error, "");
}

#[test]
fn an_engine_is_told_when_nobody_has_the_version_any_more() {
    let mut rollout = Rollout::new(0);
    rollout.publish();
    rollout.bench.tell(Event::PublisherLost { publisher: PublisherId(1) });
    assert!(rollout.join("e0", |_| {}).is_empty());
    let why = rollout.engine("e0").load_error;
    assert!(why.starts_with("no path to any holder of v1"), "{why}");
    let again = rollout.bench.tell(Event::TimePassed { gap: Duration::ZERO });
    assert!(again.is_empty(), "said once: {again:?}");
}

#[test]
fn a_trainer_that_cannot_be_dialled_is_told_whom_to_dial() {
    let mut rollout = Rollout::new(2);
    rollout.join("mute", |hello| hello.addresses.clear());
    let actions = rollout.publish_with(|announce| {
        announce.addresses.clear();
        announce.dials = true;
    });
    let dial = |action: &Action| match action {
        Action::DialReceiver(order) => Some((order.receiver.to_string(), order.addresses.clone())),
        _ => None,
    };
    let dialled: Vec<_> = actions.iter().filter_map(dial).collect();
    let at = |id: &str| (id.to_owned(), vec![format!("{id}:7000")]);
    assert_eq!(dialled, [at("e0"), at("e1")], "never one without a listener");
    let orders = orders(actions);
    let trainer = |order: &LoadOrder| order.sources.iter().any(|s| s.name == "trainer" && s.dials);
    let told: Vec<_> = orders.iter().map(|o| (o.receiver.to_string(), trainer(o))).collect();
    assert_eq!(told, [("e0".into(), true), ("e1".into(), true), ("mute".into(), false)]);
}

#[test]
fn a_second_trainer_with_the_same_number_is_told_of_the_first() {
    let mut rollout = Rollout::new(1);
    rollout.publish();
    let version = rollout.version();
    let announce = Box::new(Announce {
        session: rollout.bench.trainer,
        version,
        addresses: vec!["other:7000".into()],
        dials: false,
        bytes: 256 * MIB,
        directory: None,
        sender: None,
    });
    let publisher = PublisherId(77);
    let event = Event::VersionAnnounced { publisher, announce, reply: ReplyTo(9) };
    let why = rollout.bench.tell(event).into_iter().find_map(|action| match action {
        Action::Reply { answer: Answer::Failed { why, .. }, .. } => Some(why),
        _ => None,
    });
    let why = why.expect("refused");
    assert!(why.contains("at trainer:7000") && why.contains("at other:7000"), "{why}");
}
