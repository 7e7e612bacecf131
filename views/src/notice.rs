//! Changes of state that are worth telling: lines of the log, `GET /events`, the ZeroMQ feed, metrics.

use std::collections::BTreeMap;

use anabranch_proto::{BatchSeq, EngineId, Incarnation, LoadStage, Verdict, Version};
use serde::{Deserialize, Serialize};

/// One change of state. The JSON has the variant's name in snake case as `event`, the variant's fields, and two
/// fields that the manager adds when it tells the notice: `id` (1, 2, 3, ... in one life of the manager) and
/// `at_ms` (since that life began).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "event")]
pub enum Notice {
    /// A trainer opened a job.
    JobOpened {
        /// Name of the job.
        job: String,
        /// Epoch of the job.
        epoch: u32,
        /// The job was known already.
        resumed: bool,
    },
    /// No trainer was heard for too long: generation stops.
    TrainerLost {
        /// Samples that were running.
        running: u32,
    },
    /// An agent attached an engine.
    EngineAttached {
        /// Name of the engine.
        engine: EngineId,
        /// Life of the engine process.
        incarnation: Incarnation,
        /// Engine software and version.
        kind: String,
        /// Tokens that the KV cache holds.
        kv_tokens: u64,
        /// The engine shares its GPUs with the trainer.
        colocated: bool,
    },
    /// An agent was sent away.
    EngineRefused {
        /// Name of the engine.
        engine: EngineId,
        /// Reason, for a person.
        why: String,
    },
    /// An agent came back after a lost link.
    EngineReattached {
        /// Name of the engine.
        engine: EngineId,
        /// Samples that go on there.
        kept: u32,
        /// Samples that do not.
        dropped: u32,
    },
    /// An engine is silent: it gets no new work, and its samples wait for it.
    EngineSuspect {
        /// Name of the engine.
        engine: EngineId,
        /// Reason, for a person.
        why: String,
        /// Samples that wait.
        running: u32,
    },
    /// An engine generates with a version.
    EngineServing {
        /// Name of the engine.
        engine: EngineId,
        /// Version of the weights.
        version: Version,
        /// Verdict on the probe; none where no load came before.
        probe: Option<Verdict>,
    },
    /// An engine leaves.
    EngineDraining {
        /// Name of the engine.
        engine: EngineId,
        /// Time until what still runs is moved off.
        deadline_ms: u64,
        /// Reason, for a person.
        why: String,
    },
    /// An engine gave its memory to the trainer.
    EngineReleased {
        /// Name of the engine.
        engine: EngineId,
    },
    /// An attachment is over.
    EngineGone {
        /// Name of the engine.
        engine: EngineId,
        /// Reason, for a person.
        why: String,
    },
    /// An engine died too often.
    EngineQuarantined {
        /// Name of the engine.
        engine: EngineId,
        /// Time for which it must stay away.
        for_ms: u64,
        /// Reason, for a person.
        why: String,
    },
    /// Samples left an engine before they were finished.
    SamplesMoved {
        /// Engine that they left.
        from: EngineId,
        /// Number of samples.
        samples: u32,
        /// Tokens that they take along, at least: the manager's core hears of a sample's tokens when they have doubled.
        kept_tokens: u64,
        /// Reason, for a person.
        why: String,
    },
    /// Samples were placed on an engine.
    SamplesPlaced {
        /// Name of the engine.
        engine: EngineId,
        /// Number of samples.
        samples: u32,
        /// Samples among them that had lost an engine.
        resumed: u32,
    },
    /// A suspected poison sample is held back, to be tried alone.
    SampleHeld {
        /// Id of the sample.
        sample: String,
        /// Key of its group.
        key: String,
        /// Engine deaths at which it was running.
        deaths: u32,
    },
    /// A sample was given up.
    SampleAbandoned {
        /// Id of the sample.
        sample: String,
        /// Key of its group.
        key: String,
        /// Reason, for a person.
        why: String,
    },
    /// A trainer publishes a version.
    VersionAnnounced {
        /// Name of the version.
        version: Version,
        /// Size of the weights.
        bytes: u64,
    },
    /// A version was sealed.
    VersionAvailable {
        /// Name of the version.
        version: Version,
    },
    /// Groups are generated with a version from now on.
    VersionCurrent {
        /// Name of the version.
        version: Version,
        /// Groups that it would have made too old, and that ended first.
        waited_for_groups: u32,
    },
    /// Every engine that can serve a version serves it.
    VersionSettled {
        /// Name of the version.
        version: Version,
        /// Number of engines.
        engines: u32,
        /// Time since the seal.
        ms: u64,
    },
    /// An engine is told to load a version.
    LoadOrdered {
        /// Name of the engine.
        engine: EngineId,
        /// Name of the version.
        version: Version,
        /// Holders that it may fetch from.
        sources: Vec<String>,
    },
    /// A load reached another stage.
    LoadStage {
        /// Name of the engine.
        engine: EngineId,
        /// Name of the version.
        version: Version,
        /// Stage reached.
        stage: LoadStage,
        /// Bytes fetched and verified.
        bytes: u64,
        /// Time since the order.
        ms: u64,
        /// Why the load failed; empty while it has not.
        error: String,
        /// Bytes by the holder that gave them.
        fetched_from: BTreeMap<String, u64>,
    },
    /// Groups of a step were admitted.
    StepSubmitted {
        /// Number of the step.
        step: u64,
        /// Groups admitted.
        groups: u32,
        /// Samples of these groups.
        samples: u32,
    },
    /// A micro-batch was made.
    BatchOffered {
        /// Place in the job's sequence.
        seq: BatchSeq,
        /// Number of the step.
        step: u64,
        /// Samples in it.
        samples: u32,
        /// Tokens in it.
        tokens: u64,
        /// True for the last micro-batch of the step.
        last: bool,
    },
    /// Every consumer has a micro-batch.
    BatchAcked {
        /// Place in the job's sequence.
        seq: BatchSeq,
    },
    /// A step ended.
    StepDone {
        /// Number of the step.
        step: u64,
        /// Samples delivered.
        delivered: u64,
        /// Tokens delivered.
        tokens: u64,
        /// Groups with fewer samples than asked for.
        short: u32,
        /// Groups dropped.
        dropped: u32,
        /// Tokens thrown away by restarts and drops.
        discarded_tokens: u64,
        /// Versions that the oldest delivered token was behind.
        max_lag: u64,
    },
    /// Colocated engines changed hands.
    ModeSwitched {
        /// True: to the trainer; false: back to generation.
        train: bool,
        /// Number of engines.
        engines: u32,
        /// Samples moved off.
        moved: u32,
        /// Time that the switch took.
        ms: u64,
    },
    /// A peer broke the protocol.
    PeerMisbehaved {
        /// Name of the engine.
        engine: EngineId,
        /// What it did, for a person.
        what: String,
    },
    /// The listener was too slow: the manager did not send it this many notices. Has no `id` and no `at_ms`.
    Missed {
        /// Number of notices.
        events: u64,
    },
    /// A notice that this version of the reader does not know. No manager sends it.
    #[serde(other)]
    Unknown,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Notice {
        serde_json::from_str(text).expect("read")
    }

    #[test]
    fn notices_are_read_with_what_the_manager_adds_and_unknown_ones_are_passed_over() {
        let moved = r#"{"event":"samples_moved","from":"e1","samples":3,"kept_tokens":21,
            "why":"engine lost","id":7,"at_ms":12,"novelty":[1]}"#;
        assert!(matches!(read(moved), Notice::SamplesMoved { samples: 3, kept_tokens: 21, .. }));
        let serving = r#"{"event":"engine_serving","engine":"e1","probe":"first",
            "version":{"epoch":0,"number":4,"root":"ROOT"},"id":8,"at_ms":13}"#;
        let serving = serving.replace("ROOT", &"00".repeat(32));
        let Notice::EngineServing { version, probe, .. } = read(&serving) else {
            panic!("{serving}")
        };
        assert_eq!((version.number, probe), (4, Some(Verdict::First)));
        assert_eq!(read(r#"{"event":"engine_dreams","of":"sheep","id":8}"#), Notice::Unknown);
        assert_eq!(read(r#"{"event":"missed","events":2}"#), Notice::Missed { events: 2 });
    }
}
