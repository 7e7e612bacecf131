//! A version that goes to more engines than are ordered at once.

use std::collections::BTreeSet;

use super::*;

struct Wave {
    bench: Bench,
    sessions: Vec<SessionId>,
    ordered: Vec<SessionId>,
    most: usize,
}

impl Wave {
    fn attach(&mut self) -> SessionId {
        let id = format!("e{}", self.sessions.len());
        let actions = self.bench.attach_with(&id, |hello| {
            hello.addresses = vec![format!("{}:7000", hello.id)];
        });
        self.count(&actions);
        let session = actions.iter().find_map(welcomed).expect("welcome");
        self.sessions.push(session);
        session
    }

    fn publish(&mut self) {
        let version = Version { epoch: 0, number: 1, root: anabranch_proto::Root([1; 32]) };
        let announce = Box::new(Announce {
            session: self.bench.trainer,
            version,
            addresses: vec!["10.0.0.1:7000".into()],
            dials: false,
            bytes: 1 << 30,
            directory: None,
            sender: None,
        });
        let (publisher, reply) = (PublisherId(1), ReplyTo(3));
        self.bench.tell(Event::VersionAnnounced { publisher, announce, reply });
        let actions = self.bench.tell(Event::VersionSealed { publisher, version, reply });
        self.count(&actions);
    }

    fn count(&mut self, actions: &[Action]) {
        let order = |action: &Action| match action {
            Action::OrderLoad(order) => Some(order.session),
            _ => None,
        };
        let turn: Vec<SessionId> = actions.iter().filter_map(order).collect();
        self.most = self.most.max(turn.len());
        self.ordered.extend(turn);
    }

    fn pass(&mut self, ms: u64) {
        self.bench.now = self.bench.now + Duration::from_millis(ms);
        let actions = self.bench.tell(Event::TimePassed { gap: Duration::ZERO });
        self.count(&actions);
    }
}

#[test]
fn every_engine_is_ordered_once_some_at_a_time_whoever_leaves_and_joins_meanwhile() {
    let bench = Bench::new();
    let mut wave = Wave { bench, sessions: vec![], ordered: vec![], most: 0 };
    for _ in 0..300 {
        wave.attach();
    }
    wave.publish();
    wave.pass(1);
    assert_eq!((wave.ordered.len(), wave.most), (128, 128));
    let gone = *wave.sessions.last().expect("attached");
    let died = Event::EngineDied { session: gone, why: "it crashed".into() };
    let actions = wave.bench.tell(died);
    wave.count(&actions);
    let late = wave.attach();
    assert_eq!(wave.ordered.len(), 128, "20 ms lie between");
    for _ in 0..4 {
        wave.pass(20);
    }
    let once: BTreeSet<SessionId> = wave.ordered.iter().copied().collect();
    assert_eq!((once.len(), wave.ordered.len(), wave.most), (300, 300, 128));
    assert!(once.contains(&late) && !once.contains(&gone));
}

#[test]
fn an_engine_that_joins_is_ordered_though_all_that_were_planned_have_left() {
    let bench = Bench::new();
    let mut wave = Wave { bench, sessions: vec![], ordered: vec![], most: 0 };
    for _ in 0..129 {
        wave.attach();
    }
    wave.publish();
    wave.pass(1);
    let ordered: BTreeSet<SessionId> = wave.ordered.iter().copied().collect();
    let left = wave.sessions.iter().find(|at| !ordered.contains(at)).copied().expect("one waits");
    let late = wave.attach();
    let died = Event::EngineDied { session: left, why: "it crashed".into() };
    let actions = wave.bench.tell(died);
    wave.count(&actions);
    wave.pass(20);
    assert!(wave.ordered.contains(&late));
}
