//! Figures of the core bench out of its runs: gates with their numbers, and tables for people. Owns the goals.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde::Serialize;

use super::course::Measured;
use super::events::{SEALED, SWITCH_ASKED, SWITCH_DONE};
use super::meter::{self, Kind, Row};
use crate::report::{Bound, Report};

const GIB: f64 = (1u64 << 30) as f64;

/// One kind of event in a large fleet beside a small one.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Ratio {
    #[serde(flatten)]
    pub kind: Kind,
    /// Entities that an event looked at beyond those that it moved, in the mean.
    pub looked_small: f64,
    pub looked_large: f64,
    /// Growth of what an event visits, apart from what it moves: the smaller of two readings, `visited - moved` and
    /// `visited / (1 + moved)`. The second one is fair to events that visit each moved entity more than once.
    pub visited: f64,
    /// Mean CPU time of an event; large over small.
    pub time: f64,
}

/// The runs of one bench: fleets of growing size, then the largest at half and at full token rate.
#[derive(Clone, Debug, Serialize)]
pub struct Runs {
    pub fleets: Vec<Measured>,
    pub rates: Option<[Measured; 2]>,
}

pub fn report(runs: &Runs) -> Report {
    let mut report = Report::new("core");
    for run in &runs.fleets {
        let name = |what: &str| format!("{what}.{}", run.engines);
        report.figure(&name("core_share"), run.core_share, "cores");
        report.figure(&name("core_share_state"), run.state_share, "cores");
        report.figure(&name("ledger_share"), run.ledger_share, "cores");
    }
    let ratios = ratios(&runs.fleets);
    judge_ratios(&mut report, runs, &ratios);
    if let Some(largest) = runs.fleets.last() {
        judge_share(&mut report, largest);
        judge_rates(&mut report, runs.rates.as_ref());
        judge_maxima(&mut report, largest);
        judge_memory(&mut report, largest);
    }
    for run in runs.fleets.iter().filter(|run| run.virtual_seconds < run.asked_seconds) {
        report.note(format!(
            "{} engines: the CPU limit ended the window after {} of {} virtual seconds",
            run.engines, run.virtual_seconds, run.asked_seconds
        ));
    }
    report.note(
        "core: CPU time of this thread in Core::handle and poll_action; ledger: in Ledger::apply",
    );
    report.detail = serde_json::json!({ "runs": runs, "ratios": ratios });
    report
}

fn judge_share(report: &mut Report, largest: &Measured) {
    let id = format!("core_share_gate.{}", largest.engines);
    report
        .gate(&id, largest.core_share, "cores", Bound::AtMost, 0.5)
        .detail(format!("{:.2} of it for a page of state each second", largest.state_share));
}

fn judge_ratios(report: &mut Report, runs: &Runs, ratios: &[Ratio]) {
    if runs.fleets.len() < 2 {
        return report.note("one size of fleet: no ratios");
    }
    let counts = runs.fleets.iter().flat_map(|run| &run.rows).any(|row| row.visited > 0.0);
    let worst = ratios.iter().max_by(|a, b| a.visited.total_cmp(&b.visited));
    match worst.filter(|_| counts) {
        Some(worst) => report
            .gate("visited_ratio", worst.visited, "", Bound::AtMost, 1.1)
            .detail(name(worst.kind)),
        None => report
            .gate("visited_ratio", f64::NAN, "", Bound::AtMost, 1.1)
            .detail("the core does not count what it visits"),
    }
    if let Some(slowest) = ratios.iter().max_by(|a, b| a.time.total_cmp(&b.time)) {
        report.goal("time_ratio", slowest.time, "", Bound::AtMost, 3.0).detail(name(slowest.kind));
    }
}

fn judge_rates(report: &mut Report, rates: Option<&[Measured; 2]>) {
    let Some([once, twice]) = rates else {
        return report.note("the token rate was not doubled");
    };
    let added = (twice.core_share / once.core_share - 1.0) * 100.0;
    report.gate("double_rate", added, "% CPU", Bound::AtMost, 5.0).detail(format!(
        "core {:.3} -> {:.3}, ledger {:.3} -> {:.3} cores, {} engines",
        once.core_share, twice.core_share, once.ledger_share, twice.ledger_share, once.engines
    ));
}

fn judge_maxima(report: &mut Report, largest: &Measured) {
    let most = |events: &[&str]| {
        let rows = largest.rows.iter().filter(|row| events.contains(&row.kind.event));
        rows.map(|row| row.max_us / 1e3).fold(f64::NAN, f64::max)
    };
    // Where nobody makes it wait, a sealed version becomes current in the same event.
    let seal = if most(&[SEALED]).is_nan() { meter::CURRENT } else { SEALED };
    let gates = [
        ("max_loss", &[meter::LOSS][..], 2.0),
        ("max_seal", &[seal][..], 5.0),
        ("max_mode_switch", &[SWITCH_ASKED, SWITCH_DONE][..], 5.0),
        ("max_state", &[meter::STATE][..], 5.0),
    ];
    for (id, events, limit) in gates {
        report.gate(id, most(events), "ms", Bound::AtMost, limit);
    }
    report.gate("max_turn", largest.longest_turn_us / 1e3, "ms", Bound::AtMost, 20.0);
    report
        .goal("max_version_current", most(&[meter::CURRENT]), "ms", Bound::AtMost, 5.0)
        .detail("the event in which it becomes current: every engine gets its load order");
}

fn judge_memory(report: &mut Report, largest: &Measured) {
    let gib = |bytes: u64| bytes as f64 / GIB;
    report
        .gate("memory", gib(largest.filled_bytes), "GiB", Bound::AtMost, 2.0)
        .detail("all samples run, the queue is full, next to no tokens yet");
    report
        .figure("memory_peak", gib(largest.peak_bytes), "GiB")
        .detail(format!("{:.2} GiB of it token columns at the end", gib(largest.column_bytes)));
}

/// The largest fleet beside the smallest.
pub fn ratios(fleets: &[Measured]) -> Vec<Ratio> {
    let [small, .., large] = fleets else { return Vec::new() };
    let of_small: BTreeMap<Kind, &Row> = small.rows.iter().map(|row| (row.kind, row)).collect();
    let pair = |row: &Row| {
        let before = of_small.get(&row.kind)?;
        Some(Ratio {
            kind: row.kind,
            looked_small: before.looked(),
            looked_large: row.looked(),
            visited: over(row.looked(), before.looked())
                .min(over(row.per_moved(), before.per_moved())),
            time: over(row.mean_us, before.mean_us),
        })
    };
    large.rows.iter().filter_map(pair).collect()
}

/// Nothing over nothing is no growth.
fn over(large: f64, small: f64) -> f64 {
    match (large > 0.0, small > 0.0) {
        (_, true) => large / small,
        (false, false) => 1.0,
        (true, false) => f64::INFINITY,
    }
}

pub fn table(runs: &Runs) -> String {
    let mut out = String::new();
    let rates = runs.rates.iter().flatten();
    for run in runs.fleets.iter().chain(rates) {
        table_of(&mut out, run);
    }
    let ratios = ratios(&runs.fleets);
    if !ratios.is_empty() {
        let _ = writeln!(
            out,
            "{:36} {:>12} {:>12} {:>8} {:>8}",
            "largest fleet over smallest", "looked, s", "looked, l", "visited", "time"
        );
    }
    for ratio in ratios {
        let _ = writeln!(
            out,
            "{:36} {:>12.2} {:>12.2} {:>8.2} {:>8.2}",
            name(ratio.kind),
            ratio.looked_small,
            ratio.looked_large,
            ratio.visited,
            ratio.time
        );
    }
    out
}

fn table_of(out: &mut String, run: &Measured) {
    let _ = writeln!(
        out,
        "{} engines, chunks of {}: {} virtual s, {} samples run, {} groups queued; core {:.3}, ledger {:.3} cores",
        run.engines,
        run.chunk,
        run.virtual_seconds,
        run.running_samples,
        run.queued_groups,
        run.core_share,
        run.ledger_share
    );
    let _ = writeln!(
        out,
        "  {:34} {:>9} {:>10} {:>9} {:>9} {:>9} {:>10} {:>10} {:>8}",
        "event (w: a version waits)",
        "count",
        "total ms",
        "mean us",
        "p50 us",
        "p99 us",
        "max us",
        "visited",
        "moved"
    );
    for row in run.rows.iter().chain([&run.ledger, &run.sweep]) {
        let _ = writeln!(
            out,
            "  {:34} {:>9} {:>10.1} {:>9.1} {:>9.1} {:>9.1} {:>10.1} {:>10.2} {:>8.2}",
            name(row.kind),
            row.count,
            row.total_ms,
            row.mean_us,
            row.p50_us,
            row.p99_us,
            row.max_us,
            row.visited,
            row.moved
        );
    }
    out.push('\n');
}

/// Name of a row of the tables: `w` stands for a version that waits.
fn name(kind: Kind) -> String {
    format!("{}{}", kind.event, if kind.waiting { ", w" } else { "" })
}
