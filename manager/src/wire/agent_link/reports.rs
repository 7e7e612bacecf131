//! Reports of an agent as events of the core.

use std::time::Duration;

use anabranch_proto::pb::{self, load_state::Stage};
use anabranch_proto::{OrderId, SessionId, Version};

use crate::event::{Event, LoadReport, LoadStage, ModeReport, ProbeResult, Verdict};
use crate::wire::ingress::check::{Invalid, field};

pub(super) fn load(state: pb::LoadState) -> Result<LoadReport, Invalid> {
    let stage = match Stage::try_from(state.stage) {
        Ok(Stage::Fetching) => LoadStage::Fetching,
        Ok(Stage::Staged) => LoadStage::Staged,
        Ok(Stage::Quiescing) => LoadStage::Quiescing,
        Ok(Stage::Loading) => LoadStage::Loading,
        Ok(Stage::Probing) => LoadStage::Probing,
        Ok(Stage::Active) => LoadStage::Active,
        Ok(Stage::Failed) => LoadStage::Failed,
        Ok(Stage::Unspecified) | Err(_) => {
            return Err(field("load_state.stage", format!("{} is unknown", state.stage)));
        }
    };
    let version = state.version.ok_or_else(|| field("load_state.version", "missing"))?;
    Ok(LoadReport {
        order: OrderId(state.order),
        version: Version::try_from(version).map_err(|error| field("load_state.version", error))?,
        stage,
        bytes: state.bytes,
        error: state.error,
        probe: state.probe.map(probe).transpose()?,
        fetched_from: state.fetched_from.into_iter().collect(),
        holds: state.holds,
        ingress: state.ingress_bytes_per_s,
        egress: state.egress_bytes_per_s,
        served: state.served_bytes,
    })
}

fn probe(probe: pb::Probe) -> Result<ProbeResult, Invalid> {
    use pb::probe::Verdict as Wire;
    let verdict = match Wire::try_from(probe.verdict) {
        Ok(Wire::Agrees) => Verdict::Agrees,
        Ok(Wire::First) => Verdict::First,
        Ok(Wire::Inconclusive) => Verdict::Inconclusive,
        Ok(Wire::Disagrees) => Verdict::Disagrees,
        Ok(Wire::Unspecified) | Err(_) => {
            return Err(field("load_state.probe.verdict", format!("{} is unknown", probe.verdict)));
        }
    };
    if probe.logprobs.iter().any(|value| value.is_nan()) {
        return Err(field("load_state.probe.logprobs", "not a number"));
    }
    Ok(ProbeResult { ids: probe.ids, logprobs: probe.logprobs, verdict })
}

pub(super) fn mode(session: SessionId, done: pb::ModeDone) -> Event {
    let pb::ModeDone { order, ok, drained, memory_released, error } = done;
    let report = ModeReport { ok, drained, memory_released, error };
    Event::ModeReported { session, order: OrderId(order), report }
}

pub(super) fn preemption(session: SessionId, notice: pb::Notice) -> Event {
    let within = Duration::from_millis(notice.preempt_in_ms.into());
    Event::PreemptionNoticed { session, within, why: notice.why }
}
