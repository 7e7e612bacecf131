//! The story at info level: one line per change of state, in one place. Single samples are at debug.

use anabranch_proto::{EngineId, LoadStage};
use anabranch_views::Notice;
use tracing::{debug, info, warn};

pub(crate) fn log(notice: &Notice) {
    match notice {
        Notice::JobOpened { job, epoch, resumed } => {
            let how = if *resumed { "taken up again" } else { "opened" };
            info!("job {job} {how}, epoch {epoch}");
        }
        Notice::TrainerLost { running } => {
            warn!("no trainer: generation stops, {running} samples were running");
        }
        Notice::StepSubmitted { step, groups, samples } => {
            info!("step {step}: {groups} groups, {samples} samples submitted");
        }
        Notice::BatchOffered { seq, step, samples, tokens, last } => {
            let last = if *last { ", the last" } else { "" };
            info!(
                "step {step}: micro-batch {}: {samples} samples, {} tokens{last}",
                seq.0,
                grouped(*tokens)
            );
        }
        Notice::BatchAcked { seq } => debug!("micro-batch {} acknowledged", seq.0),
        Notice::StepDone { step, delivered, tokens, short, dropped, discarded_tokens, max_lag } => {
            info!(
                "step {step} done: {delivered} samples, {} tokens, lag at most {max_lag}, {short} groups short, \
             {dropped} dropped, {} tokens discarded",
                grouped(*tokens),
                grouped(*discarded_tokens),
            )
        }
        Notice::ModeSwitched { train, engines, moved, ms } => {
            let to = if *train { "training" } else { "generation" };
            info!("switched to {to} in {ms} ms: {engines} engines, {moved} samples moved");
        }
        Notice::SamplesMoved { .. }
        | Notice::SamplesPlaced { .. }
        | Notice::SampleHeld { .. }
        | Notice::SampleAbandoned { .. } => samples(notice),
        Notice::VersionAnnounced { .. }
        | Notice::VersionAvailable { .. }
        | Notice::VersionCurrent { .. }
        | Notice::VersionSettled { .. }
        | Notice::LoadOrdered { .. }
        | Notice::LoadStage { .. } => versions(notice),
        _ => engines(notice),
    }
}

fn engines(notice: &Notice) {
    match notice {
        Notice::EngineAttached { engine, incarnation, kind, kv_tokens, colocated } => {
            let place = if *colocated { ", colocated" } else { "" };
            let kv = grouped(*kv_tokens);
            info!(
                "{engine} attached: {kind}, KV of {kv} tokens{place} (incarnation {})",
                incarnation.0
            );
        }
        Notice::EngineRefused { engine, why } => warn!("{engine} refused: {why}"),
        Notice::EngineReattached { engine, kept, dropped } => {
            info!("{engine} is back: {kept} samples go on, {dropped} dropped");
        }
        Notice::EngineSuspect { engine, why, running } => {
            warn!("{engine} is suspect ({why}): {running} samples wait for it");
        }
        Notice::EngineServing { engine, version, probe } => {
            let probe = probe.map(|verdict| format!(", probe {verdict}"));
            info!("{engine} serves {version}{}", probe.unwrap_or_default());
        }
        Notice::EngineDraining { engine, deadline_ms, why } => {
            info!("{engine} drains within {deadline_ms} ms: {why}");
        }
        Notice::EngineReleased { engine } => info!("{engine} gave its memory to the trainer"),
        Notice::EngineGone { engine, why } => warn!("{engine} is gone: {why}"),
        Notice::EngineQuarantined { engine, for_ms, why } => {
            warn!("{engine} must stay away for {for_ms} ms: {why}");
        }
        Notice::PeerMisbehaved { engine, what } => warn!("{engine} broke the protocol: {what}"),
        other => debug!(?other, "notice"),
    }
}

fn samples(notice: &Notice) {
    match notice {
        Notice::SamplesMoved { from, samples, kept_tokens, why } => {
            info!(
                "{samples} samples moved off {from}, {} tokens kept: {why}",
                grouped(*kept_tokens)
            );
        }
        Notice::SamplesPlaced { engine, samples, resumed: 0 } => {
            debug!("{samples} samples placed on {engine}");
        }
        Notice::SamplesPlaced { engine, samples, resumed } => {
            info!("{samples} samples placed on {engine}, {resumed} of them resumed");
        }
        Notice::SampleHeld { sample, key, deaths } => {
            warn!(
                "{sample} of {key} was running at {deaths} engine deaths: held back, to be tried alone"
            );
        }
        Notice::SampleAbandoned { sample, key, why } => warn!("{sample} of {key} abandoned: {why}"),
        other => debug!(?other, "notice"),
    }
}

fn versions(notice: &Notice) {
    match notice {
        Notice::VersionAnnounced { version, bytes } => {
            info!("{version} announced, {} bytes", grouped(*bytes));
        }
        Notice::VersionAvailable { version } => info!("{version} sealed"),
        Notice::VersionCurrent { version, waited_for_groups: 0 } => info!("{version} is current"),
        Notice::VersionCurrent { version, waited_for_groups } => {
            info!(
                "{version} is current, after {waited_for_groups} groups that it would have made too old"
            );
        }
        Notice::VersionSettled { version, engines, ms } => {
            info!("{version} is active on all {engines} engines, {ms} ms after it was sealed");
        }
        Notice::LoadOrdered { engine, version, sources } => {
            info!("{engine} is told to load {version} from {}", sources.join(", "));
        }
        Notice::LoadStage { engine, version, stage: LoadStage::Failed, error, .. } => {
            warn!("{engine} could not load {version}: {error}");
        }
        Notice::LoadStage {
            engine,
            version,
            stage: LoadStage::Active,
            bytes,
            ms,
            fetched_from,
            ..
        } => {
            active(engine, &version.to_string(), *bytes, *ms, fetched_from);
        }
        Notice::LoadStage { engine, version, stage, bytes, .. } => {
            debug!("{engine}: {version} {stage}, {} bytes", grouped(*bytes));
        }
        other => debug!(?other, "notice"),
    }
}

fn active(
    engine: &EngineId,
    version: &str,
    bytes: u64,
    ms: u64,
    from: &std::collections::BTreeMap<String, u64>,
) {
    let from: Vec<String> =
        from.iter().map(|(who, n)| format!("{} from {who}", grouped(*n))).collect();
    let from = if from.is_empty() { String::new() } else { format!(" ({})", from.join(", ")) };
    info!("{engine} loaded {version}: {} bytes in {ms} ms{from}", grouped(bytes));
}

/// 41203 -> "41,203".
pub(crate) fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::with_capacity(digits.len() + digits.len() / 3);
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

#[cfg(test)]
mod tests {
    #[test]
    fn large_numbers_are_readable() {
        let written: Vec<String> = [0, 999, 1000, 41_203, 1_234_567].map(super::grouped).into();
        assert_eq!(written, ["0", "999", "1,000", "41,203", "1,234,567"]);
    }
}
