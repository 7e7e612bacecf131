use super::*;
use crate::config::{EngineConfig, ModelSpec};
use crate::model::Synthetic;
use crate::synthetic::{Chain, SyntheticParams, WeightsKey, base_digest, next};

const PARAMS: SyntheticParams = SyntheticParams { vocab: 1000, eos_id: 2, mean_len: None };

type TestCore = Core<Synthetic, ()>;

fn core(change: impl FnOnce(&mut EngineConfig)) -> TestCore {
    let mut config =
        EngineConfig::new(ModelSpec::Synthetic(PARAMS), "127.0.0.1:0".parse().unwrap());
    config.rate = Some(100.0);
    change(&mut config);
    Core::new(Synthetic::new(PARAMS, &config), &config)
}

fn request(rid: &str, new: u32) -> Request {
    let sampling = Sampling {
        max_new_tokens: new,
        min_new_tokens: 0,
        temperature: 1.0,
        top_p: 1.0,
        top_k: 0,
        min_p: 0.0,
        stop_token_ids: vec![],
        ignore_eos: false,
        seed: Some(7),
    };
    Request {
        rid: rid.to_owned(),
        prompt: vec![10, 11, 12],
        sampling: Arc::new(sampling),
        stream: true,
        return_logprob: true,
        return_extra: false,
        interval: 8,
    }
}

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// Steps at every due time up to `until`; returns what was delivered: (when, rid, total tokens, end).
fn drive(
    core: &mut TestCore,
    from: Duration,
    until: Duration,
) -> Vec<(Duration, String, usize, Option<End>)> {
    let mut seen = Vec::new();
    let mut now = from;
    loop {
        core.step(now);
        core.deliver(|seq, end| {
            seen.push((now, seq.request.rid.clone(), seq.tokens.len(), end.cloned()));
            true
        });
        match core.next_due(now) {
            Some(due) if due <= until => now = due.max(now),
            _ => return seen,
        }
    }
}

fn expected(count: usize, digests: impl Fn(usize) -> [u8; 32]) -> Vec<u32> {
    let mut chain = Chain::new(7).extend(&[10, 11, 12]);
    (0..count)
        .map(|i| {
            let made = next(chain, WeightsKey::new(&digests(i)), PARAMS, false);
            chain = chain.push(made.token);
            made.token
        })
        .collect()
}

#[test]
fn the_first_token_is_sent_at_once_and_then_chunks_of_eight_on_the_pace() {
    let mut core = core(|_| {});
    core.submit(request("a", 20), ()).map_err(|_| ()).unwrap();
    let seen = drive(&mut core, ms(0), ms(1000));
    let shape: Vec<_> = seen.iter().map(|(at, _, total, _)| (at.as_millis(), *total)).collect();
    assert_eq!(shape, [(0, 1), (80, 9), (160, 17), (190, 20)]);
    assert_eq!(seen[3].3, Some(End::Length));
    assert!(core.is_empty());
    assert_eq!(core.counters().used_tokens, 0);
}

#[test]
fn a_coarse_tick_makes_all_tokens_that_are_due() {
    let mut core = core(|_| {});
    core.submit(request("a", 100), ()).map_err(|_| ()).unwrap();
    core.step(ms(0));
    core.step(ms(55));
    core.deliver(|seq, _| {
        assert_eq!(seq.tokens, expected(6, |_| base_digest()));
        true
    });
}

#[test]
fn a_slow_client_gets_its_tokens_later_in_one_larger_chunk() {
    let mut core = core(|config| config.rate = None);
    core.submit(request("a", 100), ()).map_err(|_| ()).unwrap();
    core.step(ms(0));
    core.deliver(|_, _| false);
    core.step(ms(1));
    assert!(core.has_undelivered());
    let mut got = 0;
    core.deliver(|seq, _| {
        got = seq.tokens.len() - seq.sent;
        true
    });
    assert_eq!(got, 16);
    assert!(!core.has_undelivered());
}

#[test]
fn no_more_than_max_running_run_and_the_oldest_wait_least() {
    let mut core = core(|config| config.max_running = 2);
    for rid in ["a", "b", "c"] {
        core.submit(request(rid, 5), ()).map_err(|_| ()).unwrap();
    }
    core.step(ms(0));
    assert_eq!((core.counters().running, core.counters().waiting), (2, 1));
    let seen = drive(&mut core, ms(1), ms(1000));
    let ended: Vec<_> = seen.iter().filter(|s| s.3.is_some()).map(|s| s.1.as_str()).collect();
    assert_eq!(ended, ["a", "b", "c"]);
}

#[test]
fn the_youngest_is_retracted_when_the_cache_is_full_and_still_gets_the_same_tokens() {
    let mut core = core(|config| config.kv_tokens = 40);
    core.submit(request("a", 30), ()).map_err(|_| ()).unwrap();
    core.submit(request("b", 30), ()).map_err(|_| ()).unwrap();
    let mut ends = Vec::new();
    let mut now = ms(0);
    while !core.is_empty() {
        core.step(now);
        core.deliver(|seq, end| {
            if end.is_some() {
                ends.push((seq.request.rid.clone(), seq.retractions > 0, seq.tokens.clone()));
            }
            true
        });
        now += ms(10);
        assert!(now < ms(10_000));
    }
    let truth = expected(30, |_| base_digest());
    assert_eq!(ends, [("a".to_owned(), false, truth.clone()), ("b".to_owned(), true, truth)]);
}

#[test]
fn a_retract_pause_with_an_update_splits_the_spans_where_the_weights_changed() {
    let mut core = core(|_| {});
    core.submit(request("a", 20), ()).map_err(|_| ()).unwrap();
    drive(&mut core, ms(0), ms(55));
    core.pause(PauseMode::Retract);
    core.submit(request("later", 1), ()).map_err(|_| ()).unwrap();
    core.begin_update(Update {
        path: "/new".into(),
        version: Some("v1".to_owned()),
        abort_all: false,
        flush: true,
        ticket: 5,
    });
    assert_eq!(core.take_actions(), [Action::Load("/new".into())]);
    core.step(ms(100));
    assert_eq!(core.counters().running, 0, "nothing runs while paused");
    core.loaded(Ok([9; 32]), ms(200));
    let [Action::Reply { ticket: 5, reply }] = &core.take_actions()[..] else {
        panic!("one reply")
    };
    assert!(reply.success, "{reply:?}");
    core.step(ms(300));
    assert_eq!(core.counters().running, 0, "an update does not end the pause");
    core.resume(ms(400));
    core.step(ms(400));
    let mut now = ms(400);
    let mut done = false;
    while !done {
        now += ms(10);
        core.step(now);
        core.deliver(|seq, end| {
            if seq.request.rid == "a" && end.is_some() {
                let split = |i: usize| if i < 6 { base_digest() } else { [9; 32] };
                assert_eq!(seq.tokens, expected(20, split));
                let marks: Vec<_> = seq.marks.iter().map(|m| (&*m.label, m.start)).collect();
                assert_eq!(marks, [("default", 0), ("v1", 6)]);
                assert_eq!(seq.retractions, 1);
                done = true;
            }
            true
        });
    }
}

#[test]
fn an_update_without_a_pause_waits_for_requests_in_flight_and_holds_new_ones_back() {
    let mut core = core(|_| {});
    core.submit(request("old", 10), ()).map_err(|_| ()).unwrap();
    core.step(ms(0));
    let update =
        Update { path: "/w".into(), version: None, abort_all: false, flush: true, ticket: 0 };
    core.begin_update(update);
    core.submit(request("new", 10), ()).map_err(|_| ()).unwrap();
    assert_eq!(core.take_actions(), []);
    let seen = drive(&mut core, ms(1), ms(5000));
    assert!(seen.iter().all(|s| s.1 == "old"), "{seen:?}");
    assert_eq!(core.take_actions(), [Action::Load("/w".into())]);
    assert_eq!(core.next_due(ms(5000)), None);
    core.loaded(Ok([1; 32]), ms(6000));
    assert_eq!(&**core.label(), "default", "an update without a version keeps the label");
    let seen = drive(&mut core, ms(6000), ms(9000));
    assert_eq!(seen.last().unwrap().1, "new");
}

#[test]
fn an_in_place_update_with_a_flush_changes_the_weights_and_not_the_label() {
    let mut core = core(|_| {});
    core.submit(request("a", 10), ()).map_err(|_| ()).unwrap();
    core.step(ms(0));
    core.pause(PauseMode::InPlace);
    let version = Some("v1".to_owned());
    let update = Update { path: "/w".into(), version, abort_all: false, flush: true, ticket: 0 };
    core.begin_update(update.clone());
    core.loaded(Ok([1; 32]), ms(5));
    core.begin_update(Update { flush: false, ticket: 1, ..update });
    let replies: Vec<_> = core.take_actions();
    let Action::Reply { reply, .. } = &replies[1] else { panic!("{replies:?}") };
    assert!(
        !reply.success
            && reply.message.starts_with("Weights were updated, but the cache was not flushed")
    );
    assert_eq!((core.model().digest(), &**core.label()), ([1; 32], "default"));
    core.loaded(Ok([2; 32]), ms(6));
    assert_eq!((core.model().digest(), &**core.label()), ([2; 32], "v1"));
}

#[test]
fn a_refused_update_leaves_weights_label_and_running_sequences_alone() {
    let mut core = core(|_| {});
    core.submit(request("a", 20), ()).map_err(|_| ()).unwrap();
    core.step(ms(0));
    core.pause(PauseMode::Retract);
    let version = Some("v1".to_owned());
    core.begin_update(Update {
        path: "/w".into(),
        version,
        abort_all: false,
        flush: true,
        ticket: 0,
    });
    core.take_actions();
    core.loaded(Err(crate::weights::WeightsError::NoTensors("/w".into())), ms(1));
    let [Action::Reply { reply, .. }] = &core.take_actions()[..] else { panic!("one reply") };
    assert!(!reply.success && reply.message.contains("/w"), "{reply:?}");
    assert_eq!((core.model().digest(), &**core.label()), (base_digest(), "default"));
    core.resume(ms(2));
    assert!(drive(&mut core, ms(2), ms(5000)).last().unwrap().3 == Some(End::Length));
}

#[test]
fn aborts_name_running_and_queued_requests_apart_and_free_everything() {
    let mut core = core(|config| config.max_running = 1);
    core.submit(request("run", 50), ()).map_err(|_| ()).unwrap();
    core.submit(request("wait", 50), ()).map_err(|_| ()).unwrap();
    core.step(ms(0));
    assert!(core.abort("run") && core.abort("wait") && !core.abort("nobody"));
    let mut ends = Vec::new();
    core.deliver(|seq, end| {
        ends.push((seq.request.rid.clone(), end.cloned().unwrap()));
        true
    });
    let abort = |message: &str, queued| End::Abort { message: message.to_owned(), queued };
    let want = [
        ("run".to_owned(), abort("Aborted", false)),
        ("wait".to_owned(), abort("Abort in waiting queue", true)),
    ];
    assert_eq!(ends, want);
    assert!(core.is_empty());
    core.submit(request("run", 1), ()).map_err(|_| ()).expect("the rid is free again");
}

#[test]
fn a_stall_is_no_debt_and_a_slow_engine_keeps_its_order() {
    let mut core = core(|_| {});
    core.submit(request("a", 50), ()).map_err(|_| ()).unwrap();
    core.step(ms(0));
    core.stall(ms(1000));
    core.step(ms(500));
    assert_eq!(core.next_due(ms(500)), Some(ms(1000)));
    core.step(ms(1000));
    assert_eq!(core.counters().generated_total, 2, "one token before, one after, no burst");
    core.slow(10.0);
    core.step(ms(1010));
    core.step(ms(1109));
    assert_eq!(core.counters().generated_total, 3);
    core.step(ms(1110));
    assert_eq!(core.counters().generated_total, 4);
}

#[test]
fn a_prefill_rate_delays_the_first_token_by_the_length_of_the_past() {
    let mut core = core(|config| config.prefill_rate = Some(100.0));
    core.submit(request("a", 2), ()).map_err(|_| ()).unwrap();
    core.step(ms(0));
    assert_eq!(core.next_due(ms(0)), Some(ms(30)));
    core.step(ms(30));
    assert_eq!(core.counters().generated_total, 1);
}

#[test]
fn bad_requests_are_refused_with_their_fact() {
    let mut core = core(|config| (config.context_capacity, config.max_waiting) = (16, 1));
    let refuse = |core: &mut TestCore, request| {
        core.submit(request, ()).map_err(|(refusal, ())| refusal).unwrap_err()
    };
    let with = |prompt: Vec<u32>, new| Request { prompt, ..request("x", new) };
    assert_eq!(refuse(&mut core, with(vec![], 1)), Refusal::Empty);
    let out = Refusal::Vocabulary { id: 1000, at: 1, vocab: 1000 };
    assert_eq!(refuse(&mut core, with(vec![1, 1000], 1)), out);
    assert_eq!(refuse(&mut core, with(vec![1; 16], 1)), Refusal::TooLong { len: 16, context: 16 });
    let over = Refusal::OverContext { len: 10, new: 7, total: 17, context: 16 };
    assert_eq!(refuse(&mut core, with(vec![1; 10], 7)), over);
    core.submit(request("x", 1), ()).map_err(|_| ()).unwrap();
    assert_eq!(refuse(&mut core, request("x", 1)), Refusal::Duplicate("x".to_owned()));
    assert_eq!(refuse(&mut core, request("y", 1)), Refusal::Full(1));
}

#[test]
fn released_memory_serves_nothing_until_it_is_back_and_the_weights_are_loaded_again() {
    let mut core = core(|_| {});
    core.submit(request("a", 2), ()).map_err(|_| ()).unwrap();
    assert!(core.release(true, true).unwrap_err().contains("1 requests are live"));
    drive(&mut core, ms(0), ms(100));
    core.release(true, true).unwrap();
    assert!(core.submit(request("b", 1), ()).is_err());
    let update =
        Update { path: "/w".into(), version: None, abort_all: false, flush: true, ticket: 0 };
    core.begin_update(update.clone());
    assert!(matches!(&core.take_actions()[..], [Action::Reply { reply, .. }] if !reply.success));
    core.resume_memory(true, true);
    assert!(core.submit(request("b", 1), ()).is_err(), "memory without content does not serve");
    core.begin_update(update);
    core.loaded(Ok([4; 32]), ms(200));
    assert!(core.submit(request("b", 1), ()).is_ok());
}
