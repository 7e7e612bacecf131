//! The summary in plain sentences, for readers who read nothing else. Owns wording only.

use super::html::thousands;
use super::{Phase, Report, Verdict};

/// Paragraphs of the summary: learning, samples, weights, warm-up.
pub fn sentences(report: &Report) -> [String; 4] {
    let warm_up = format!(
        "The supervised warm-up took {:.1} s, {:.0}% of the {:.0} s; it showed the form of an \
         answer with the wrong content.",
        report.warmup_s,
        100.0 * report.warmup_s / report.wall_s.max(1e-9),
        report.wall_s
    );
    [learning(report), samples(report), weights(report), warm_up]
}

/// `phase` in words.
pub fn phase(phase: Phase) -> String {
    match phase {
        Phase::Joining => "joining".to_owned(),
        Phase::Serving { version } => format!("serving version {version}"),
        Phase::Loading { version } => format!("loading version {version}"),
        Phase::Released => "memory lent to the trainer".to_owned(),
        Phase::Suspect => "suspect".to_owned(),
        Phase::Draining => "draining".to_owned(),
    }
}

fn learning(report: &Report) -> String {
    let gain = report.exact_after - report.exact_before;
    let change = match gain {
        g if g >= 0.005 => "rose",
        g if g <= -0.005 => "fell",
        _ => "did not move",
    };
    let mut text = format!(
        "Over {} optimizer steps, greedy exact match on problems that were never trained on {change}: \
         {:.3} before, {:.3} after.",
        report.steps, report.exact_before, report.exact_after
    );
    if !report.publishing {
        text += " This was the control: the engines were never given the new weights.";
    }
    text
}

fn samples(report: &Report) -> String {
    let fate = match report.verdict() {
        Verdict::Kept => "None was lost and none came twice.".to_owned(),
        Verdict::Broken => {
            format!("{} were lost and {} came twice.", report.lost, report.duplicated)
        }
    };
    let gone = report.engines.iter().filter(|e| e.left_s.is_some()).count();
    format!(
        "{} engines made {} samples ({} tokens); {gone} of them left before the end. {} times a sample \
         went on on another engine, after its last token; {} samples hold tokens of several engines, \
         {} of several weight versions. {fate} {} tokens were made by an engine and never received.",
        report.engines.len(),
        thousands(report.trajectories),
        thousands(report.tokens),
        thousands(report.migrations),
        thousands(report.across_engines),
        thousands(report.across_versions),
        thousands(report.discarded_tokens),
    )
}

fn weights(report: &Report) -> String {
    let mut delays: Vec<f64> =
        report.versions.iter().flat_map(|v| v.active_s.values().copied()).collect();
    delays.sort_by(f64::total_cmp);
    let (Some(slowest), Some(largest)) =
        (delays.last(), report.versions.iter().map(|v| v.bytes).max())
    else {
        return "No new weights were published.".to_owned();
    };
    let kept = report.versions.iter().map(|v| v.publish_s).fold(0.0, f64::max);
    format!(
        "{} versions of up to {} kB were published. An engine served a new one after {:.2} s at the \
         median and {slowest:.2} s at the slowest; the trainer itself was kept for at most {:.0} ms.",
        report.versions.len(),
        thousands(largest.div_ceil(1000)),
        delays[delays.len() / 2],
        kept * 1000.0,
    )
}
