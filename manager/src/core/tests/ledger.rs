//! What the ledger says to the core: silence, cleared and frozen pages.

use super::*;
use crate::ledger::Silent;

struct One {
    bench: Bench,
    session: SessionId,
    sample: SampleId,
    attempt: Attempt,
}

impl One {
    /// One sample of the group `k` that runs on engine `a` and has made `kept` tokens.
    fn running(kept: u32, change: impl FnOnce(&mut Sampling)) -> Self {
        let mut bench = Bench::new();
        let session = bench.attach("a").iter().find_map(welcomed).expect("welcome");
        let mut sampling = Sampling::new(50);
        change(&mut sampling);
        let (sample, attempt, _) = starts(&bench.submit_with("k", &[5], sampling))[0];
        if kept > 0 {
            let facts = vec![Fact::Grew { sample, attempt, kept, oldest: 0 }];
            bench.tell(Event::FactsFound { session, facts });
        }
        Self { bench, session, sample, attempt }
    }

    fn silent(&mut self, since: Now, had_token: bool) -> Vec<Action> {
        let (sample, attempt, session) = (self.sample, self.attempt, self.session);
        let silent = vec![Silent { sample, attempt, since, had_token }];
        self.bench.tell(Event::SilenceFound { session, silent })
    }

    /// Time passes, and the engine is heard.
    fn pass(&mut self, ms: u64) {
        let until = self.bench.now + Duration::from_millis(ms);
        while self.bench.now < until {
            self.bench.now = until.min(self.bench.now + Duration::from_secs(1));
            self.bench.tell(Event::EngineHeard { session: self.session, tokens: 0 });
        }
    }

    fn cancel(&mut self, keep_partial: bool) -> Vec<Action> {
        let (session, what, reply) = (self.bench.trainer, CancelWhat::All, ReplyTo(7));
        self.bench.tell(Event::GroupsCancelled { session, what, keep_partial, reply })
    }

    fn state(&self) -> &'static str {
        self.bench.core.rollout.sample(self.sample).expect("it is there").state().name()
    }
}

fn stops(actions: &[Action]) -> usize {
    actions.iter().filter(|action| matches!(action, Action::Stop { .. })).count()
}

#[test]
fn an_attempt_is_moved_once_it_has_been_silent_for_its_own_deadline() {
    let config = CoreConfig::default();
    for (had_token, deadline_ms) in [(true, config.progress_ms), (false, config.first_token_ms)] {
        let mut one = One::running(u32::from(had_token), |_| {});
        let since = one.bench.now;
        one.pass(deadline_ms);
        assert_eq!(stops(&one.silent(since, had_token)), 0, "20 ms more for what runs there");
        one.pass(23);
        assert_eq!(stops(&one.silent(since, had_token)), 1);
        assert_eq!(stops(&one.silent(since, had_token)), 0, "it is off the engine");
    }
}

#[test]
fn a_long_prompt_has_more_time_for_its_first_token() {
    let mut bench = Bench::new();
    let long = |hello: &mut EngineHello| {
        (hello.model.max_context, hello.kv_tokens) = (100_000, 100_000);
    };
    let session = bench.attach_with("a", long).iter().find_map(welcomed).expect("welcome");
    let (sample, attempt, _) = starts(&bench.submit("k", &[5; 60_000], 10))[0];
    let mut one = One { bench, session, sample, attempt };
    let since = one.bench.now;
    one.pass(75_000);
    assert_eq!(stops(&one.silent(since, false)), 0, "a second more for each 1,000 tokens");
    one.pass(6_000);
    assert_eq!(stops(&one.silent(since, false)), 1);
}

#[test]
fn silence_is_not_held_against_an_engine_that_was_loading() {
    let mut one = One::running(1, |_| {});
    let since = one.bench.now;
    one.pass(60_000);
    one.bench.core.fleet.update(one.session, |engine| engine.makes_since = one.bench.now);
    assert_eq!(stops(&one.silent(since, true)), 0);
}

#[test]
fn a_cancelled_sample_ends_with_what_the_ledger_has() {
    let mut one = One::running(8, |_| {});
    let actions = one.cancel(true);
    assert!(actions.iter().any(|action| matches!(action, Action::FreezePage { .. })));
    assert_eq!(one.state(), "waiting", "until the ledger has said what there is");
    let sample = one.sample;
    one.bench.tell(Event::PageFrozen { sample, kept: 11, oldest: 0 });
    assert_eq!(one.state(), "finished");
    assert_eq!(one.bench.core.rollout.sample(sample).expect("there").live.kept, 11);
}

#[test]
fn a_cancelled_sample_without_tokens_is_not_delivered_and_a_finished_one_is_no_cancelled_one() {
    let mut one = One::running(0, |_| {});
    one.cancel(true);
    let sample = one.sample;
    one.bench.tell(Event::PageFrozen { sample, kept: 0, oldest: u64::MAX });
    assert!(one.bench.core.rollout.sample(sample).is_none_or(|s| s.state().name() == "abandoned"));

    let mut one = One::running(8, |_| {});
    one.cancel(true);
    let (sample, attempt, session) = (one.sample, one.attempt, one.session);
    let how = Finished::Length;
    let facts = vec![Fact::Finished { sample, attempt, kept: 50, oldest: 0, how, running: false }];
    one.bench.tell(Event::FactsFound { session, facts });
    let state = one.bench.core.rollout.sample(sample).expect("there").state().clone();
    assert_eq!(format!("{state:?}"), "Finished { how: Length }");
}

#[test]
fn a_sample_that_is_too_old_while_it_is_cancelled_is_not_delivered() {
    let mut one = One::running(8, |_| {});
    one.cancel(true);
    let (now, group) = (one.bench.now, one.sample.group);
    one.bench.core.restart_groups(now, &[group], 1);
    let sample = one.sample;
    one.bench.tell(Event::PageFrozen { sample, kept: 8, oldest: 0 });
    assert!(one.bench.core.rollout.sample(sample).is_none_or(|s| s.state().name() == "abandoned"));
}

#[test]
fn what_cannot_be_replayed_restarts_whatever_the_core_has_heard() {
    let mut one = One::running(0, |sampling| {
        sampling.presence_penalty = 0.5;
        sampling.replay = anabranch_proto::Replay::RestartOk;
    });
    one.bench.attach("b");
    let session = one.session;
    let moved = one.bench.tell(Event::EngineDied { session, why: "it crashed".into() });
    let clear = moved.iter().position(|action| matches!(action, Action::ClearPage { .. }));
    let start = moved.iter().position(|action| matches!(action, Action::Start(_)));
    assert!(clear.expect("cleared") < start.expect("started"), "{moved:?}");
    let sample = one.sample;
    one.bench.tell(Event::PageCleared { sample, tokens: 3 });
    assert_eq!(one.bench.core.counters().regenerated_tokens, 3);
}

#[test]
fn an_attempt_that_the_ledger_ended_is_stopped_at_its_engine() {
    let mut one = One::running(1, |_| {});
    let (sample, attempt, session) = (one.sample, one.attempt, one.session);
    let why = crate::ledger::Ended::Lost("past its pin".into());
    let facts = vec![Fact::Ended { sample, attempt, kept: 1, oldest: 0, why }];
    assert_eq!(stops(&one.bench.tell(Event::FactsFound { session, facts })), 1);
}

#[test]
fn growth_that_is_told_after_a_restart_is_of_tokens_that_were_thrown_away() {
    let mut one = One::running(8, |_| {});
    one.bench.attach("b");
    let (sample, first, session) = (one.sample, one.attempt, one.session);
    let now = one.bench.now;
    one.bench.core.restart_groups(now, &[sample.group], 1);
    let again = one.bench.tell(Event::TimePassed { gap: Duration::ZERO });
    let (_, second, at) = starts(&again)[0];
    let late = Fact::Grew { sample, attempt: first, kept: 40, oldest: 0 };
    one.bench.tell(Event::FactsFound { session, facts: vec![late] });
    let live = |one: &One| one.bench.core.rollout.sample(sample).expect("there").live.clone();
    assert_eq!((live(&one).kept, live(&one).oldest), (0, u64::MAX));
    let fresh = Fact::Grew { sample, attempt: second, kept: 1, oldest: 2 };
    one.bench.tell(Event::FactsFound { session: at, facts: vec![fresh] });
    assert_eq!((live(&one).kept, live(&one).had_token), (1, true));
}
