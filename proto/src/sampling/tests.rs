use super::*;

fn all_set() -> Sampling {
    Sampling::new(64)
        .min_tokens(2)
        .temperature(0.5)
        .top_p(0.9)
        .top_k(40)
        .min_p(0.1)
        .stop_ids([7, 8])
        .stop_strings(["END"])
        .ignore_eos(true)
        .presence_penalty(-1.0)
        .frequency_penalty(1.0)
        .repetition_penalty(1.5)
        .seed(11)
        .replay(Replay::RestartOk)
        .extra("json_schema", "{}")
}

#[test]
fn every_setting_goes_over_the_wire_and_back() {
    for sampling in [Sampling::default(), Sampling::greedy(1), all_set()] {
        assert_eq!(Sampling::try_from(pb::Sampling::from(sampling.clone())), Ok(sampling));
    }
}

#[test]
fn what_is_left_out_of_a_message_has_its_documented_default() {
    let read = Sampling::try_from(pb::Sampling { max_tokens: 4, ..Default::default() });
    assert_eq!(read, Ok(Sampling::new(4)));
    assert!(!Sampling::new(4).restart_ok());
    assert!(all_set().restart_ok());
}

#[test]
fn the_ends_of_every_bound_are_allowed() {
    let at_the_ends = [
        Sampling::new(1).min_tokens(1),
        Sampling::new(1).temperature(100.0),
        Sampling::new(1).top_p(f32::MIN_POSITIVE),
        Sampling::new(1).top_k(MAX_TOP_K),
        Sampling::new(1).min_p(1.0),
        Sampling::new(1).presence_penalty(2.0).frequency_penalty(-2.0),
        Sampling::new(1).repetition_penalty(2.0),
        Sampling::new(1).stop_ids(0..MAX_STOP_IDS as u32),
        Sampling::new(1).stop_strings(vec!["x".repeat(MAX_STOP_STRING_BYTES); MAX_STOP_STRINGS]),
    ];
    for sampling in at_the_ends {
        assert_eq!(sampling.check(), Ok(()), "{sampling:?}");
    }
}

#[test]
fn every_bound_is_refused_with_field_value_and_rule() {
    let base = || Sampling::new(16);
    for (sampling, says) in [
        (Sampling::new(0), "max_tokens: must be at least 1, not 0"),
        (
            base().min_tokens(17),
            "min_tokens: 17 is above max_tokens, 16; lower one or raise the other",
        ),
        (
            base().temperature(f32::NAN),
            "temperature: NaN is not between 0 and 100; 0 takes the likeliest token",
        ),
        (
            base().temperature(-1.0),
            "temperature: -1 is not between 0 and 100; 0 takes the likeliest token",
        ),
        (base().top_p(0.0), "top_p: 0 is not above 0 and at most 1; 1 is off"),
        (base().top_p(1.5), "top_p: 1.5 is not above 0 and at most 1; 1 is off"),
        (
            base().top_k(MAX_TOP_K + 1),
            "top_k: 1073741825 is not between 0 and 1073741824; 0 is off",
        ),
        (base().min_p(f32::INFINITY), "min_p: inf is not between 0 and 1; 0 is off"),
        (base().presence_penalty(3.0), "presence_penalty: 3 is not between -2 and 2; 0 is off"),
        (
            base().frequency_penalty(-2.5),
            "frequency_penalty: -2.5 is not between -2 and 2; 0 is off",
        ),
        (
            base().repetition_penalty(0.0),
            "repetition_penalty: 0 is not above 0 and at most 2; 1 is off",
        ),
        (
            base().repetition_penalty(2.5),
            "repetition_penalty: 2.5 is not above 0 and at most 2; 1 is off",
        ),
        (base().stop_ids(0..=MAX_STOP_IDS as u32), "stop_ids: 1025 ids, at most 1024 are allowed"),
        (
            base().stop_strings(vec!["x"; MAX_STOP_STRINGS + 1]),
            "stop_strings: 65 strings, at most 64 are allowed",
        ),
        (
            base().stop_strings(["ok", ""]),
            "stop_strings: empty; it would end every sample at once; leave it out",
        ),
        (
            base().stop_strings(["x".repeat(MAX_STOP_STRING_BYTES + 1)]),
            "stop_strings: 1025 bytes in one, at most 1024 are allowed",
        ),
    ] {
        assert_eq!(sampling.check().expect_err(says).to_string(), says);
    }
}

#[test]
fn an_unknown_replay_is_refused() {
    let odd = pb::Sampling { max_tokens: 1, replay: 9, ..Default::default() };
    let error = Sampling::try_from(odd).expect_err("unknown").to_string();
    assert_eq!(error, "replay: 9 is unknown: strict or restart_ok");
}
