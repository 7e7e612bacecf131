//! Roll-outs in virtual time: what the plan and the receivers' queues promise together, with and without
//! deaths. 256 MiB in chunks of 1 MiB at 200 Mbit/s; figures are shares of one transfer over such a link.

use std::time::Duration;

use anabranch_sim::transfer::{FanOut, Transfer, fan_out, run};

const BYTES: u64 = 256 << 20;
const CHUNK: u32 = 1 << 20;
/// 200 Mbit/s.
const RATE: u64 = 25_000_000;
/// What a silent link may cost, over the wire time: `FetchRules::progress`.
const DEADLINE: f64 = 5.0 * RATE as f64 / BYTES as f64;

fn plain(receivers: usize) -> Transfer {
    Transfer::plain(receivers, BYTES, CHUNK, RATE)
}

fn ran(transfer: &Transfer) -> FanOut {
    run(transfer).unwrap_or_else(|broken| panic!("{broken}: {transfer:?}"))
}

#[test]
fn the_last_of_many_is_done_soon_after_the_first_and_the_trainer_sends_one_copy() {
    for receivers in [1, 2, 3, 4, 8, 16, 32] {
        let out = fan_out(receivers, BYTES, CHUNK, RATE);
        let (last, egress, again) = (out.last_over_wire, out.trainer_egress, out.again);
        println!("K = {receivers}: last {last:.3}, trainer egress {egress:.3}, again {again:.4}");
        assert!(out.last_over_wire <= 1.15, "{out:?}");
        assert!((0.999..1.001).contains(&out.trainer_egress), "{out:?}");
        assert!(out.again <= 0.001, "{out:?}");
    }
}

#[test]
fn whoever_dies_whenever_the_others_are_done_soon_and_get_little_twice() {
    let mut worst = FanOut::default();
    for seed in 0..200 {
        let transfer = Transfer::of_seed(seed);
        let out = ran(&transfer);
        assert!(out.last_over_wire <= 1.25, "seed {seed}: {transfer:?} {out:?}");
        assert!(out.joiner_over_wire <= 1.25, "seed {seed}: {transfer:?} {out:?}");
        assert!(out.again <= 0.02, "seed {seed}: {transfer:?} {out:?}");
        worst.last_over_wire = worst.last_over_wire.max(out.last_over_wire);
        worst.joiner_over_wire = worst.joiner_over_wire.max(out.joiner_over_wire);
        worst.trainer_egress = worst.trainer_egress.max(out.trainer_egress);
        worst.again = worst.again.max(out.again);
    }
    println!("the worst of 200 seeds: {worst:?}");
}

#[test]
fn a_link_that_goes_down_costs_the_others_one_progress_deadline() {
    for seed in 0..30 {
        let at = Duration::from_millis(300 + seed * 350);
        let out = ran(&Transfer { cuts: vec![(at, seed as usize % 8)], ..plain(8) });
        assert!(out.last_over_wire <= 1.25 + DEADLINE, "cut at {at:?}: {out:?}");
        assert!(out.again <= 0.02, "cut at {at:?}: {out:?}");
    }
}

#[test]
fn a_late_joiner_costs_the_trainer_nothing_whenever_it_comes() {
    for (receivers, at_ms) in [(8, 1_000), (8, 5_000), (8, 11_100), (8, 12_500), (3, 20_000)] {
        let out = ran(&Transfer { joins: vec![Duration::from_millis(at_ms)], ..plain(receivers) });
        assert!(out.trainer_to_joiners == 0.0, "{out:?}");
        assert!(out.joiner_over_wire <= 1.1 && out.last_over_wire <= 1.15, "{out:?}");
    }
}

#[test]
fn a_slow_host_holds_up_nobody_once_its_rate_is_known() {
    let known = Transfer { slow: vec![(1, RATE / 4)], rates_known: true, ..plain(8) };
    let others = |out: &FanOut| {
        let others = out.took_over_wire.iter().enumerate().filter(|(at, _)| *at != 1);
        others.map(|(_, took)| *took).fold(0.0, f64::max)
    };
    let (before, after) = (ran(&Transfer { rates_known: false, ..known.clone() }), ran(&known));
    assert!(others(&before) > 3.0, "the slowest link rules: {before:?}");
    assert!(others(&after) <= 1.15, "{after:?}");
}

#[test]
fn a_world_reproduces_exactly() {
    let twice = [(); 2].map(|()| format!("{:?}", ran(&Transfer::of_seed(7))));
    assert_eq!(twice[0], twice[1]);
}
