//! Trainers that restart, leave zombies behind, and come back with other ranks.

use super::*;
use anabranch_proto::BatchSeq;

/// A job whose samples finish at once, in batches of one.
struct Trainers {
    bench: Bench,
    engine: SessionId,
    consumers: u64,
}

impl Trainers {
    fn new() -> Self {
        let mut bench = Bench::new();
        let engine = bench.attach("a").iter().find_map(welcomed).expect("welcome");
        Self { bench, engine, consumers: 0 }
    }

    fn open(&mut self, epoch: u32, resume: Option<u64>) -> Vec<Action> {
        let actions = self.bench.tell(Event::JobOpened {
            open: Box::new(OpenJob { epoch, resume: resume.map(BatchSeq), ..opening() }),
            reply: ReplyTo(1),
        });
        let opened = actions.iter().find_map(|action| match action {
            Action::Reply { answer: Answer::Opened { session, .. }, .. } => Some(*session),
            _ => None,
        });
        self.bench.trainer = opened.unwrap_or(self.bench.trainer);
        actions
    }

    /// Attaches a consumer with credit. Gives its id, and the batches that it is sent.
    fn consume(&mut self, index: u32, count: u32) -> (ConsumerId, Vec<u64>) {
        self.consumers += 1;
        let consumer = ConsumerId(self.consumers);
        let (session, shard) = (self.bench.trainer, Shard { index, count });
        let pack = Pack { min: 1, multiple_of: 1, whole_groups: false, max_wait: None };
        // What a shard has no sample of needs no credit.
        let mut sent = self.bench.tell(Event::ConsumerAttached { session, consumer, pack, shard });
        let credit = Event::CreditGranted { consumer, bytes: 1 << 30, samples: 1 << 20 };
        sent.extend(self.bench.tell(credit));
        (consumer, delivered(&sent, consumer))
    }

    fn finish(&mut self, key: &str) {
        let (sample, attempt, _) = starts(&self.bench.submit(key, &[5], 10))[0];
        let how = Finished::Length;
        let fact = Fact::Finished { sample, attempt, kept: 10, oldest: 0, how, running: false };
        self.bench.tell(Event::FactsFound { session: self.engine, facts: vec![fact] });
    }

    fn ack(&mut self, consumer: ConsumerId, seq: u64) {
        self.bench.tell(Event::BatchAcked { consumer, seq: BatchSeq(seq) });
    }

    fn commit(&mut self, consumer: ConsumerId, seq: u64) -> Vec<Action> {
        self.bench.tell(Event::BatchCommitted { consumer, seq: BatchSeq(seq) })
    }

    fn retained(&self) -> usize {
        self.bench.core.rollout.books().retained()
    }
}

fn delivered(actions: &[Action], to: ConsumerId) -> Vec<u64> {
    let seq = |action: &Action| match action {
        Action::Deliver { consumer, batch, .. } if *consumer == to => Some(batch.seq.0),
        _ => None,
    };
    actions.iter().filter_map(seq).collect()
}

#[test]
fn an_old_epochs_consumer_is_closed_and_commits_nothing() {
    let mut trainers = Trainers::new();
    let (zombie, _) = trainers.consume(0, 1);
    trainers.finish("k");
    let opened = trainers.open(1, Some(0));
    let closed =
        |a: &Action| matches!(a, Action::CloseConsumer { consumer, .. } if *consumer == zombie);
    assert!(opened.iter().any(closed), "{opened:?}");
    trainers.ack(zombie, 1);
    trainers.commit(zombie, 1);
    assert_eq!(trainers.retained(), 1);
    assert_eq!(trainers.consume(0, 1).1, [1], "the new trainer gets it");
}

#[test]
fn an_old_epochs_close_cancels_nothing() {
    let mut trainers = Trainers::new();
    let zombie = trainers.bench.trainer;
    trainers.open(1, None);
    let running = starts(&trainers.bench.submit("k", &[5], 10));
    assert_eq!(running.len(), 1);
    let actions = trainers.bench.tell(Event::JobClosed {
        session: zombie,
        cancel_running: true,
        reply: ReplyTo(5),
    });
    assert!(!actions.iter().any(|action| matches!(action, Action::Stop { .. })), "{actions:?}");
}

#[test]
fn a_shard_that_has_not_attached_yet_loses_nothing() {
    let mut trainers = Trainers::new();
    let (first, _) = trainers.consume(0, 2);
    trainers.finish("k");
    trainers.ack(first, 1);
    trainers.commit(first, 1);
    assert_eq!(trainers.retained(), 1, "the other shard has not committed it");
    let (second, sent) = trainers.consume(1, 2);
    assert_eq!(sent, [1]);
    trainers.commit(second, 1);
    assert_eq!(trainers.retained(), 0);
}

#[test]
fn fewer_shards_after_a_restart_hold_nothing_back() {
    let mut trainers = Trainers::new();
    for shard in 0..4 {
        trainers.consume(shard, 4);
    }
    trainers.finish("k");
    trainers.open(1, Some(0));
    for shard in 0..2 {
        let (consumer, sent) = trainers.consume(shard, 2);
        assert_eq!(sent, [1]);
        trainers.commit(consumer, 1);
    }
    assert_eq!(trainers.retained(), 0);
}

#[test]
fn shards_that_are_counted_anew_within_an_epoch_get_what_is_not_committed() {
    let mut trainers = Trainers::new();
    let (consumer, _) = trainers.consume(0, 1);
    trainers.finish("k");
    trainers.ack(consumer, 1);
    trainers.bench.tell(Event::ConsumerLost { consumer });
    assert_eq!(trainers.consume(0, 2).1, [1]);
    assert_eq!(trainers.consume(1, 2).1, [1]);
}

#[test]
fn a_cursor_of_another_managers_life_drops_nothing_and_numbers_go_on_behind_it() {
    let mut trainers = Trainers::new();
    let (consumer, _) = trainers.consume(0, 1);
    trainers.finish("k");
    let refused = format!("{:?}", trainers.open(1, Some(50)));
    assert!(refused.contains("another manager or an earlier life"), "{refused}");
    assert_eq!(trainers.retained(), 1);
    trainers.commit(consumer, 1);
    trainers.open(1, Some(50));
    trainers.consume(0, 1);
    trainers.finish("l");
    assert_eq!(trainers.bench.core.rollout.books().last().0, 51);
}

#[test]
fn a_second_rank_does_not_rewind_the_first() {
    let mut trainers = Trainers::new();
    trainers.open(1, Some(0));
    let (first, _) = trainers.consume(0, 2);
    trainers.finish("k");
    trainers.ack(first, 1);
    trainers.commit(first, 1);
    trainers.open(1, Some(0));
    let (second, sent) = trainers.consume(1, 2);
    assert_eq!(sent, [1]);
    trainers.commit(second, 1);
    assert_eq!(trainers.retained(), 0, "the first rank's commit stands");
}

#[test]
fn what_was_booked_and_not_made_is_given_back_when_a_sample_ends() {
    let mut trainers = Trainers::new();
    let admitted = |trainers: &Trainers| trainers.bench.core.rollout.books().admitted_tokens();
    let (sample, attempt, _) = starts(&trainers.bench.submit("k", &[5], 50))[0];
    assert_eq!(admitted(&trainers), 51);
    let how = Finished::Length;
    let fact = Fact::Finished { sample, attempt, kept: 10, oldest: 0, how, running: false };
    trainers.bench.tell(Event::FactsFound { session: trainers.engine, facts: vec![fact] });
    assert_eq!(admitted(&trainers), 11);
    let (consumer, _) = trainers.consume(0, 1);
    trainers.commit(consumer, 1);
}
