//! One WatchVersions stream: each version's status when it changes, seen through the state at 5 Hz.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use anabranch_proto::pb::{self, version_status::OnEngine};
use anabranch_views::{ProgressView, VersionView};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use crate::wire::gate::Gate;
use crate::wire::streams::Out;

const EVERY: Duration = Duration::from_millis(200);
const STATUSES: usize = 64;

pub(super) fn watch(gate: Arc<Gate>) -> ReceiverStream<Result<pb::VersionStatus, Status>> {
    let (out, stream) = mpsc::channel(STATUSES);
    gate.drain.clone().spawn("watch-versions", run(gate, out));
    ReceiverStream::new(stream)
}

async fn run(gate: Arc<Gate>, out: Out<pb::VersionStatus>) {
    let mut every = tokio::time::interval(EVERY);
    every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut seen: BTreeMap<anabranch_proto::Version, pb::VersionStatus> = BTreeMap::new();
    loop {
        tokio::select! {
            _ = every.tick() => {}
            () = out.closed() => return,
            () = gate.drain.cancelled() => return,
        }
        let Ok(state) = gate.inbox.whole_state().await else { return };
        seen.retain(|known, _| state.versions.iter().any(|view| view.version == *known));
        for view in &state.versions {
            let status = status(view);
            if seen.get(&view.version) == Some(&status) {
                continue;
            }
            seen.insert(view.version, status.clone());
            if out.send(Ok(status)).await.is_err() {
                return;
            }
        }
    }
}

fn status(view: &VersionView) -> pb::VersionStatus {
    let engine = |(id, on): (&String, &ProgressView)| OnEngine {
        engine: id.clone(),
        stage: on.stage.to_string(),
        bytes: on.bytes,
        since_ms: on.since_sealed_ms,
        error: on.error.clone(),
    };
    pb::VersionStatus {
        version: Some(view.version.into()),
        state: view.state.to_string(),
        bytes: view.bytes,
        engines: view.engines.iter().map(engine).collect(),
        settled: view.settled,
    }
}
