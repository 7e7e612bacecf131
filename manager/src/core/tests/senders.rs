//! Several senders of one version.

use super::*;
use crate::action::LoadOrder;
use crate::event::SenderOf;

struct Senders {
    bench: Bench,
    sessions: Vec<SessionId>,
}

fn version(number: u64, root: u8) -> Version {
    Version { epoch: 0, number, root: anabranch_proto::Root([root; 32]) }
}

impl Senders {
    fn new(count: usize) -> Self {
        let mut bench = Bench::new();
        bench.attach_with("e0", |hello| hello.addresses = vec!["e0:7000".into()]);
        let mut sessions = vec![bench.trainer];
        // The other ranks open the same job.
        while sessions.len() < count {
            sessions.push(bench.open());
        }
        Self { bench, sessions }
    }

    fn announce(&mut self, of: SenderOf, number: u64) -> Vec<Action> {
        self.announce_with(of.index, number, |announce| announce.sender = Some(of))
    }

    fn announce_with(
        &mut self,
        index: u32,
        number: u64,
        change: impl FnOnce(&mut Announce),
    ) -> Vec<Action> {
        let mut announce = Announce {
            session: self.sessions[index as usize],
            version: Version { root: anabranch_proto::Root::default(), ..version(number, 0) },
            addresses: vec![format!("rank{index}:7000")],
            dials: false,
            bytes: 64 << 20,
            directory: None,
            sender: None,
        };
        change(&mut announce);
        let (publisher, reply) = (publisher(index, number), ReplyTo(3));
        let announce = Box::new(announce);
        self.bench.tell(Event::VersionAnnounced { publisher, announce, reply })
    }

    fn seal(&mut self, index: u32, version: Version) -> Vec<Action> {
        let publisher = publisher(index, version.number);
        self.bench.tell(Event::VersionSealed { publisher, version, reply: ReplyTo(4) })
    }

    fn lose(&mut self, index: u32, number: u64) {
        self.bench.tell(Event::PublisherLost { publisher: publisher(index, number) });
    }
}

fn publisher(index: u32, number: u64) -> PublisherId {
    PublisherId(100 * number + u64::from(index))
}

fn part(index: u32, count: u32) -> SenderOf {
    SenderOf { index, count, part: true }
}

fn orders(actions: &[Action]) -> Vec<LoadOrder> {
    let order = |action: &Action| match action {
        Action::OrderLoad(order) => Some((**order).clone()),
        _ => None,
    };
    actions.iter().filter_map(order).collect()
}

fn tellings(actions: &[Action]) -> usize {
    actions.iter().filter(|action| matches!(action, Action::TellPublisher { .. })).count()
}

fn refusal(actions: &[Action]) -> Option<String> {
    actions.iter().find_map(|action| match action {
        Action::Reply { answer: Answer::Failed { why, .. }, .. } => Some(why.clone()),
        _ => None,
    })
}

#[test]
fn a_version_of_several_senders_is_available_when_the_last_has_sealed_and_comes_from_all() {
    let mut senders = Senders::new(3);
    for index in 0..3 {
        assert_eq!(refusal(&senders.announce(part(index, 3), 1)), None);
    }
    for index in [2, 0] {
        let actions = senders.seal(index, version(1, 9));
        assert!(orders(&actions).is_empty() && refusal(&actions).is_none(), "{actions:?}");
    }
    let orders = orders(&senders.seal(1, version(1, 9)));
    assert_eq!(orders.len(), 1);
    let sources = &orders[0].sources;
    let told: Vec<_> = sources.iter().map(|s| (s.name.as_str(), &s.addresses[0][..])).collect();
    let at = ["rank0:7000", "rank1:7000", "rank2:7000"];
    assert_eq!(told, [("trainer 1/3", at[0]), ("trainer 2/3", at[1]), ("trainer 3/3", at[2])]);
    for source in sources {
        assert_eq!((source.origin.as_str(), &source.stripes), ("trainer", &sources[0].stripes));
    }
    let mut keys: Vec<_> = sources.iter().map(|s| s.serve_key).collect();
    keys.dedup();
    assert_eq!(keys.len(), 3, "each honours its own grants");
    // It is current on the engine: each sender is told.
    let told = senders.bench.tell(Event::LoadReported {
        session: orders[0].session,
        report: Box::new(LoadReport {
            order: orders[0].order,
            version: version(1, 9),
            stage: LoadStage::Fetching,
            bytes: 1,
            error: String::new(),
            probe: None,
            fetched_from: BTreeMap::new(),
            holds: false,
            ingress: 0,
            egress: 0,
            served: 0,
        }),
    });
    assert_eq!(tellings(&told), 0, "they were told at the seal");
    for (ms, expected) in [(0, 0), (99, 0), (1, 3), (100, 0)] {
        senders.bench.now = senders.bench.now + Duration::from_millis(ms);
        let told = senders.bench.tell(Event::TimePassed { gap: Duration::ZERO });
        assert_eq!(tellings(&told), expected, "the report, not before 100 ms have passed");
    }
}

#[test]
fn senders_with_other_roots_are_both_named_and_the_version_is_not_available() {
    let mut senders = Senders::new(2);
    senders.announce(part(0, 2), 1);
    senders.announce(part(1, 2), 1);
    senders.seal(0, version(1, 1));
    let actions = senders.seal(1, version(1, 2));
    let why = refusal(&actions).expect("refused");
    for word in ["sender 1 of 2", "rank0:7000", "sender 2 of 2", "same bytes"] {
        assert!(why.contains(word), "{word}: {why}");
    }
    assert!(orders(&actions).is_empty());
    // It may still come to its senses.
    assert_eq!(orders(&senders.seal(1, version(1, 1))).len(), 1);
}

#[test]
fn a_publisher_that_is_not_one_of_the_senders_is_refused() {
    let mut senders = Senders::new(2);
    senders.announce(part(0, 2), 1);
    let text = |actions: Vec<Action>| refusal(&actions).expect("refused");
    // It says nothing, it says another number of senders, or it says that it is who is there already.
    let silent = text(senders.announce_with(1, 1, |_| {}));
    let other = text(senders.announce(part(1, 3), 1));
    let twice = text(senders.announce_with(1, 1, |a| a.sender = Some(part(0, 2))));
    for why in [silent, other, twice] {
        assert!(why.contains("at rank0:7000") && why.contains("at rank1:7000"), "{why}");
        assert!(why.contains("sender 1 of 2"), "{why}");
    }
}

#[test]
fn a_version_is_offered_from_the_trainer_while_its_senders_have_all_of_it() {
    for whole in [false, true] {
        let mut senders = Senders::new(2);
        for index in 0..2 {
            senders.announce(SenderOf { part: !whole, ..part(index, 2) }, 1);
        }
        senders.seal(0, version(1, 9));
        senders.seal(1, version(1, 9));
        senders.lose(1, 1);
        let late = orders(&senders.bench.attach("late"));
        // Nobody else has it as a whole, as yet.
        let trainers = late.iter().flat_map(|o| &o.sources).filter(|s| s.origin == "trainer");
        let names: Vec<_> = trainers.map(|s| s.name.as_str()).collect();
        assert_eq!(names, if whole { vec!["trainer 1/2"] } else { vec![] });
        let state = senders.bench.core.state(senders.bench.now);
        let error = &state.engines.last().expect("it is attached").load_error;
        assert_eq!(error.contains("of its 2 senders 1 serve it, each a part"), !whole, "{error}");
        // It is back, and nothing has to be sealed by the other one again.
        assert_eq!(refusal(&senders.announce(SenderOf { part: !whole, ..part(1, 2) }, 1)), None);
        assert_eq!(refusal(&senders.seal(1, version(1, 9))), None);
        let later = orders(&senders.bench.attach("later"));
        let trainers = later.iter().flat_map(|o| &o.sources).filter(|s| s.origin == "trainer");
        assert_eq!(trainers.count(), 2, "{later:?}");
    }
}

#[test]
fn a_sender_lost_before_its_seal_leaves_the_version_waiting_for_it() {
    let mut senders = Senders::new(2);
    senders.announce(part(0, 2), 1);
    senders.announce(part(1, 2), 1);
    senders.seal(0, version(1, 9));
    senders.lose(1, 1);
    senders.announce(part(1, 2), 1);
    assert_eq!(orders(&senders.seal(1, version(1, 9))).len(), 1);
    // And with the last one gone before the seal, there is no such version.
    senders.announce(part(0, 2), 2);
    senders.lose(0, 2);
    assert_eq!(refusal(&senders.announce_with(0, 2, |_| {})), None);
}
