//! The JSON that scripts rely on. A test that fails here means a change that breaks readers.

use std::collections::BTreeMap;
use std::sync::Arc;

use anabranch_proto::{
    EngineId, Incarnation, LoadStage, LogprobsMode, OnRunning, Root, Staleness, Verdict, Version,
    VersionState,
};
use anabranch_views::*;
use serde_json::{Value, json};

fn version(number: u64) -> Version {
    Version { epoch: 1, number, root: Root([number as u8; 32]) }
}

fn version_json(number: u64) -> Value {
    json!({"epoch": 1, "number": number, "root": format!("{number:02x}").repeat(32)})
}

fn engine() -> EngineView {
    EngineView {
        id: "e1".into(),
        incarnation: 5,
        session: 3,
        state: EngineState::Updating { from: version(2), to: version(3) },
        version: Some(version(2)),
        connected: true,
        kind: "sglang".into(),
        gpus: 1,
        running: 4,
        kv_used: 0.5,
        load: Some(LoadView {
            version: version(3),
            stage: LoadStage::Fetching.into(),
            bytes: 10,
            total: 40,
            parents: vec!["trainer".into()],
            ..LoadView::default()
        }),
        holds: vec![version(2)],
        ingress: Some(7),
        ..EngineView::default()
    }
}

fn engine_json() -> Value {
    json!({
        "id": "e1", "incarnation": 5, "session": 3,
        "state": "updating", "from": version_json(2), "to": version_json(3),
        "version": version_json(2), "connected": true, "kind": "sglang", "gpus": 1, "colocated": false,
        "running": 4, "committed_tokens": 0, "kv_tokens": 0, "kv_used": 0.5, "tokens": 0, "joined_ms": 0,
        "heard_ms": 0,
        "load": {"version": version_json(3), "stage": "fetching", "bytes": 10, "total": 40, "ms": 0,
                 "parents": ["trainer"], "fetched_from": {}, "error": ""},
        "load_error": "", "holds": [version_json(2)], "preemptible": false, "ingress": 7, "egress": null,
        "reserved": false,
    })
}

fn state() -> StateView {
    let on = ProgressView { stage: LoadStage::Fetching.into(), bytes: 10, ..Default::default() };
    StateView {
        job: Some(JobView {
            name: "job".into(),
            staleness: Some(Staleness::bounded(2)),
            convention: LogprobsMode::Tempered.into(),
            on_running: OnRunning::Continue.into(),
            ..JobView::default()
        }),
        current: version(2),
        fleet: FleetView {
            engines: 1,
            states: BTreeMap::from([("updating".into(), 1)]),
            serving_gpus: 0,
        },
        engines: vec![engine()],
        versions: vec![VersionView {
            version: version(3),
            state: VersionState::Available.into(),
            stages: BTreeMap::from([(LoadStage::Fetching.into(), 1)]),
            engines: BTreeMap::from([("e1".into(), on)]),
            ..VersionView::default()
        }],
        steps: vec![StepView { step: 4, ..StepView::default() }],
        queue: QueueView { blocked: Some("no engine serves yet".into()), ..Default::default() },
        ..StateView::default()
    }
}

fn state_json() -> Value {
    json!({
        "anabranch": "0.1.0", "manager_epoch": 6,
        "uptime_ms": 0,
        "job": {"name": "job", "epoch": 0, "staleness": {"max_lag": 2, "on_exceed": "wait"},
                "convention": "tempered", "on_running": "continue", "trainers": 0, "paused": false,
                "trainer_heard_ms": 0},
        "current": version_json(2), "pending": null, "training": false,
        "fleet": {"engines": 1, "states": {"updating": 1}, "serving_gpus": 0},
        "engines": [engine_json()], "next": null,
        "versions": [{"version": version_json(3), "state": "available", "bytes": 0, "settled": false,
                      "at_trainer": false, "stages": {"fetching": 1},
                      "engines": {"e1": {"stage": "fetching", "bytes": 10, "since_sealed_ms": 0, "error": "",
                                         "parents": [], "fetched_from": {}, "served": 0}}}],
        "steps": [{"step": 4, "is_final": false, "over": false, "groups": 0, "open_groups": 0, "pooled": 0,
                   "delivered": 0, "tokens": 0, "discarded_tokens": 0, "max_lag": 0, "short": 0, "dropped": 0}],
        "samples": {"waiting": 0, "running": 0, "finished": 0, "delivered": 0, "abandoned": 0},
        "queue": {"resumed": 0, "fresh": 0, "held": 0, "blocked": "no engine serves yet"},
        "egress": {"offered": 0, "acked": 0, "committed": 0, "retained_batches": 0, "consumers": false},
        "admitted_tokens": 0, "admission_limit": 0,
        "counters": {"tokens": 0, "finished": 0, "delivered": 0, "delivered_tokens": 0, "committed": 0,
                     "abandoned": 0, "dropped": 0, "migrations": 0, "restarts": 0,
                     "regenerated_tokens": 0, "engine_deaths": 0, "misbehaved": 0},
        "ledger": {"tokens": 0, "repeated_tokens": 0, "stale_tokens": 0, "foreign_tokens": 0, "past_stop_tokens": 0,
                   "cleared_tokens": 0, "resumed_tokens": 0, "broken": 0, "pages": 0},
    })
}

#[test]
fn the_state_has_these_fields_and_is_read_back() {
    let answer = StateAnswer {
        anabranch: "0.1.0".into(),
        manager_epoch: 6,
        state: Arc::new(state()),
        ledger: LedgerView::default(),
    };
    let json = serde_json::to_value(&answer).expect("plain data");
    assert_eq!(json, state_json());
    assert_eq!(serde_json::from_value::<StateAnswer>(json).expect("read"), answer);
}

#[test]
fn notices_have_these_fields_and_are_read_back() {
    let engine = || EngineId::new("e1");
    for (notice, expected) in [
        (
            Notice::EngineAttached {
                engine: engine(),
                incarnation: Incarnation(5),
                kind: "sglang".into(),
                kv_tokens: 9,
                colocated: true,
            },
            json!({"event": "engine_attached", "engine": "e1", "incarnation": 5, "kind": "sglang",
                   "kv_tokens": 9, "colocated": true}),
        ),
        (
            Notice::EngineServing {
                engine: engine(),
                version: version(3),
                probe: Some(Verdict::Agrees),
            },
            json!({"event": "engine_serving", "engine": "e1", "version": version_json(3), "probe": "agrees"}),
        ),
        (
            Notice::LoadStage {
                engine: engine(),
                version: version(3),
                stage: LoadStage::Active,
                bytes: 40,
                ms: 8,
                error: String::new(),
                fetched_from: BTreeMap::from([("trainer".into(), 40)]),
            },
            json!({"event": "load_stage", "engine": "e1", "version": version_json(3), "stage": "active",
                   "bytes": 40, "ms": 8, "error": "", "fetched_from": {"trainer": 40}}),
        ),
        (Notice::BatchAcked { seq: 7.into() }, json!({"event": "batch_acked", "seq": 7})),
    ] {
        let json = serde_json::to_value(&notice).expect("plain data");
        assert_eq!(json, expected);
        assert_eq!(serde_json::from_value::<Notice>(json).expect("read"), notice);
    }
}
