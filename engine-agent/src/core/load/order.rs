//! A load order as the manager gave it and as the agent reports it; and the verdict on a probe.
//! Pure.

use std::path::PathBuf;
use std::time::Duration;

use anabranch_proto::pb;
use anabranch_proto::{LoadStage, OnRunning, Verdict, Version};
use anabranch_runtime::Now;

use super::traffic::Traffic;
use crate::core::event::{ProbeResult, StagedVersion};

/// One order to load a version.
#[derive(Clone, Debug)]
pub struct LoadOrder {
    /// Id of the order, given by the manager.
    pub id: u64,
    /// The version to load.
    pub to: Version,
    /// Fate of running samples.
    pub on_running: OnRunning,
    /// Time by which the fetch must be done; `None`: no deadline.
    pub deadline: Option<Now>,
    /// The deadline as given, for error texts; 0: none.
    pub deadline_ms: u32,
    /// Size of the version, in bytes; 0 if unknown.
    pub bytes: u64,
    /// Peers and publishers that have the version.
    pub sources: Vec<pb::Source>,
    /// Stripes of the manager's plan; 0: no plan.
    pub stripe_count: u32,
    /// Parallel streams; 0: the agent chooses.
    pub streams: u32,
    /// Shared directory to use instead of `sources`.
    pub directory: Option<PathBuf>,
    /// Probe of a replica at the same version.
    pub reference: Option<pb::Probe>,
    /// Rates measured during the fetch.
    pub traffic: Traffic,
}

/// Largest difference of two log-probabilities that agree.
const TOLERANCE: f32 = 1e-4;

impl LoadOrder {
    /// Reads an order. An order without a valid version is answered as failed.
    pub fn parse(now: Now, load: pb::Load) -> Result<LoadOrder, Box<pb::LoadState>> {
        let id = load.order;
        let on_running = OnRunning::try_from(load.on_running()).unwrap_or_default();
        let to = match load.version.clone().map(Version::try_from) {
            Some(Ok(version)) => version,
            bad => {
                let error = match bad {
                    Some(Err(error)) => error.to_string(),
                    _ => "the order names no version".to_owned(),
                };
                let failed = pb::LoadState {
                    order: id,
                    version: load.version,
                    stage: pb::load_state::Stage::Failed.into(),
                    error,
                    ..Default::default()
                };
                return Err(Box::new(failed));
            }
        };
        let deadline = Duration::from_millis(load.deadline_ms.into());
        Ok(LoadOrder {
            id,
            to,
            on_running,
            deadline: (load.deadline_ms > 0).then(|| now + deadline),
            deadline_ms: load.deadline_ms,
            bytes: load.bytes,
            sources: load.sources,
            stripe_count: load.stripe_count,
            streams: load.streams,
            directory: Some(load.directory).filter(|path| !path.is_empty()).map(PathBuf::from),
            reference: load.reference.filter(|probe| !probe.ids.is_empty()),
            traffic: Traffic::default(),
        })
    }

    /// A report on the order at `stage`.
    pub fn report(&self, stage: LoadStage) -> pb::LoadState {
        pb::LoadState {
            order: self.id,
            version: Some(self.to.into()),
            stage: pb::load_state::Stage::from(stage).into(),
            ingress_bytes_per_s: self.traffic.ingress(),
            egress_bytes_per_s: self.traffic.egress(),
            served_bytes: self.traffic.served_bytes,
            ..Default::default()
        }
    }

    /// The report that the order failed.
    pub fn failed(&self, error: String) -> pb::LoadState {
        pb::LoadState { error, ..self.report(LoadStage::Failed) }
    }

    /// The report that the version is served.
    pub fn active(
        &self,
        probe: Option<ProbeResult>,
        verdict: Verdict,
        staged: Option<&StagedVersion>,
    ) -> pb::LoadState {
        pb::LoadState {
            probe: probe.map(|probe| wire(&probe, verdict)),
            bytes: staged.map_or(0, |staged| staged.bytes),
            holds: staged.is_some_and(|staged| staged.holds),
            fetched_from: staged
                .map(|staged| staged.from.clone().into_iter().collect())
                .unwrap_or_default(),
            ..self.report(LoadStage::Active)
        }
    }
}

/// A probe as the manager gets it.
pub(super) fn wire(probe: &ProbeResult, verdict: Verdict) -> pb::Probe {
    let verdict = pb::probe::Verdict::from(verdict).into();
    pb::Probe { ids: probe.ids.clone(), logprobs: probe.logprobs.clone(), verdict }
}

/// Compares a probe with a replica's, else with the probe under the weights before.
pub(super) fn verdict(
    probe: &ProbeResult,
    reference: Option<&pb::Probe>,
    before: Option<&ProbeResult>,
) -> Verdict {
    if let Some(reference) = reference {
        let agrees = same(probe, &reference.ids, &reference.logprobs);
        return if agrees { Verdict::Agrees } else { Verdict::Disagrees };
    }
    match before {
        Some(before) if *before == *probe => Verdict::Inconclusive,
        _ => Verdict::First,
    }
}

/// True if two probes agree up to the first differing id, where the two ids must have been a tie.
fn same(probe: &ProbeResult, ids: &[u32], logprobs: &[f32]) -> bool {
    if probe.ids.len() != ids.len() || probe.logprobs.len() != logprobs.len() {
        return false;
    }
    let rows = probe.ids.iter().zip(ids).zip(probe.logprobs.iter().zip(logprobs));
    for ((ours, theirs), (our_logprob, their_logprob)) in rows {
        // A NaN is never near: the comparison is false.
        let near = (our_logprob - their_logprob).abs() <= TOLERANCE;
        if !near {
            return false;
        }
        if ours != theirs {
            return true;
        }
    }
    true
}
