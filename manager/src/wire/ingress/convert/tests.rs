use anabranch_proto::OnExceed;
use anabranch_proto::limits::MAX_META_BYTES;
use anabranch_proto::tokens::encode_ids;

use super::*;

fn good() -> pb::Group {
    pb::Group {
        key: "k1".into(),
        prompt: encode_ids(&[1, 2, 3]),
        n: 4,
        sampling: Some(pb::Sampling { max_tokens: 16, ..pb::Sampling::default() }),
        ..pb::Group::default()
    }
}

fn refused(change: impl FnOnce(&mut pb::Group)) -> String {
    let mut group = good();
    change(&mut group);
    groups(vec![good(), group]).expect_err("refused").to_string()
}

fn sampled(change: impl FnOnce(&mut pb::Sampling)) -> String {
    refused(|group| change(group.sampling.as_mut().expect("set")))
}

#[test]
fn what_is_left_out_has_its_documented_default() {
    let read = groups(vec![good()]).expect("valid");
    let sampling = &read[0].sampling;
    assert_eq!(
        (sampling.temperature, sampling.top_p, sampling.repetition_penalty),
        (1.0, 1.0, 1.0)
    );
    assert!(!sampling.restart_ok());
    assert_eq!((read[0].deadline, read[0].pin), (None, None));
}

#[test]
fn each_fault_of_a_group_is_named_with_group_field_and_rule() {
    for (error, says) in [
        (refused(|g| g.key = String::new()), "group 1 (key \"\"): key: empty"),
        (refused(|g| g.key = "a\u{7}".into()), "unprintable"),
        (refused(|g| g.key = "x".repeat(300)), "300 bytes, at most 200"),
        (refused(|g| g.prompt = Default::default()), "prompt: empty"),
        (refused(|g| g.prompt = vec![1; 7].into()), "prompt: 7 bytes are not whole token ids"),
        (refused(|g| g.n = 0), "n: 0 is not between 1 and 4096"),
        (refused(|g| g.n = 5000), "n: 5000"),
        (refused(|g| g.sampling = None), "sampling: missing; max_tokens is required"),
        (refused(|g| g.meta = vec![0; MAX_META_BYTES + 1].into()), "meta: 1048577 bytes"),
        (
            refused(|g| g.pin = Some(pb::Version { root: vec![1].into(), ..Default::default() })),
            "pin:",
        ),
        (sampled(|s| s.max_tokens = 0), "sampling: max_tokens: must be at least 1"),
        (sampled(|s| s.replay = 9), "sampling: replay: 9 is unknown"),
    ] {
        assert!(error.contains(says), "{says}: {error}");
    }
}

#[test]
fn a_job_without_policies_is_on_policy_tempered_and_continues() {
    let job = open(pb::OpenRequest { job: "j".into(), ..Default::default() }).expect("valid");
    assert_eq!(job.staleness, Staleness { max_lag: Some(0), on_exceed: OnExceed::Wait });
    assert_eq!((job.logprobs_mode, job.on_running), (LogprobsMode::Tempered, OnRunning::Continue));
    assert_eq!((job.on_trainer_lost, job.resume, job.rolling), (TRAINER_LOST, None, None));
    let error = open(pb::OpenRequest { job: "a b".into(), ..Default::default() });
    assert!(error.expect_err("a space").to_string().contains("job"));
}

#[test]
fn cancel_names_exactly_one_thing() {
    let request = |keys: &[&str], step, all| pb::CancelRequest {
        keys: keys.iter().map(|key| key.to_string()).collect(),
        step,
        all,
        ..Default::default()
    };
    assert!(matches!(cancel(request(&["a"], None, false)), Ok(CancelWhat::Keys(_))));
    assert!(matches!(cancel(request(&[], Some(3), false)), Ok(CancelWhat::Step(Step(3)))));
    assert!(matches!(cancel(request(&[], None, true)), Ok(CancelWhat::All)));
    assert!(cancel(request(&[], None, false)).is_err());
    assert!(cancel(request(&["a"], None, true)).is_err());
}

#[test]
fn a_version_that_nobody_could_fetch_is_refused() {
    let begin = |number, addresses: &[&str], directory: &str, kind| pb::publish_part::Begin {
        version: Some(pb::Version { number, ..Default::default() }),
        addresses: addresses.iter().map(|at| at.to_string()).collect(),
        directory: directory.into(),
        kind,
        ..Default::default()
    };
    let read = |begin| announce(begin, SessionId(1)).map_err(|error| error.to_string());
    assert!(read(begin(1, &["h:1"], "", 1)).is_ok());
    assert!(read(begin(1, &[], "/shared/v1", 0)).is_ok());
    for (begin, says) in [
        (begin(0, &["h:1"], "", 1), "publish from 1"),
        (begin(1, &[], "", 1), "nobody could fetch it"),
        (begin(1, &[], "v1", 1), "not an absolute path"),
        (begin(1, &["h:1"], "", 2), "full versions only"),
    ] {
        let error = read(begin).expect_err(says);
        assert!(error.contains(says), "{says}: {error}");
    }
}

#[test]
fn a_sender_is_one_of_as_many_as_it_says() {
    let begin = |index, count, directory: &str| pb::publish_part::Begin {
        version: Some(pb::Version { number: 1, ..Default::default() }),
        addresses: vec!["h:1".into()],
        directory: directory.into(),
        sender: Some(pb::publish_part::Sender { index, count, part: true }),
        ..Default::default()
    };
    let read = |begin| announce(begin, SessionId(1)).map_err(|error| error.to_string());
    let announced = read(begin(3, 4, "")).expect("the last of four");
    assert_eq!(announced.sender, Some(SenderOf { index: 3, count: 4, part: true }));
    for (begin, says) in [
        (begin(4, 4, ""), "number 4 (from 0) of 4"),
        (begin(0, 0, ""), "number 0 (from 0) of 0"),
        (begin(0, 5000, ""), "at most 1024"),
        (begin(0, 2, "/shared/v1"), "loaded in place"),
    ] {
        let error = read(begin).expect_err(says);
        assert!(error.contains(says), "{says}: {error}");
    }
}
