//! Reports of an agent as events of the core.

use anabranch_proto::millis::duration;
use anabranch_proto::{Invalid, LoadStage, OrderId, ProbeResult, SessionId, Version, pb};

use crate::event::{Event, LoadReport, ModeReport};

pub(super) fn load(state: pb::LoadState) -> Result<LoadReport, Invalid> {
    let probe = state.probe.map(ProbeResult::try_from).transpose();
    Ok(LoadReport {
        order: OrderId(state.order),
        version: Version::required("load_state.version", state.version)?,
        stage: LoadStage::from_wire("load_state.stage", state.stage)?,
        bytes: state.bytes,
        error: state.error,
        probe: probe.map_err(|invalid| invalid.inside("load_state"))?,
        fetched_from: state.fetched_from.into_iter().collect(),
        holds: state.holds,
        ingress: state.ingress_bytes_per_s,
        egress: state.egress_bytes_per_s,
        served: state.served_bytes,
    })
}

pub(super) fn mode(session: SessionId, done: pb::ModeDone) -> Event {
    let pb::ModeDone { order, ok, drained, memory_released, error } = done;
    let report = ModeReport { ok, drained, memory_released, error };
    Event::ModeReported { session, order: OrderId(order), report }
}

pub(super) fn preemption(session: SessionId, notice: pb::Notice) -> Event {
    let within = duration(notice.preempt_in_ms);
    Event::PreemptionNoticed { session, within, why: notice.why }
}
