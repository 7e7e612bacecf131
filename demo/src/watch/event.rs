//! The manager's events, as far as the demo reads them.

use serde::Deserialize;

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "snake_case", tag = "event")]
pub enum Event {
    EngineAttached {
        engine: String,
        #[serde(default)]
        colocated: bool,
    },
    EngineSuspect {
        engine: String,
        why: String,
    },
    EngineServing {
        engine: String,
        version: Version,
    },
    EngineDraining {
        engine: String,
        why: String,
    },
    EngineReleased {
        engine: String,
    },
    EngineGone {
        engine: String,
        why: String,
    },
    EngineQuarantined {
        engine: String,
        why: String,
    },
    EngineRefused {
        engine: String,
        why: String,
    },
    SamplesMoved {
        from: String,
        samples: u64,
        kept_tokens: u64,
        why: String,
    },
    VersionAnnounced {
        version: Version,
        bytes: u64,
    },
    VersionAvailable {
        version: Version,
    },
    VersionCurrent {
        version: Version,
    },
    VersionSettled {
        version: Version,
        ms: u64,
    },
    LoadStage {
        engine: String,
        version: Version,
        stage: String,
        bytes: u64,
        error: String,
    },
    SampleAbandoned {
        key: String,
        why: String,
    },
    PeerMisbehaved {
        engine: String,
        what: String,
    },
    /// The follower was too slow; the manager says how many it did not send.
    Missed {
        events: u64,
    },
    #[serde(other)]
    Other,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
pub struct Version {
    pub number: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_read_and_unknown_ones_passed_over() {
        let text = r#"{"event":"samples_moved","from":"e1","samples":3,"kept_tokens":21,
            "why":"engine lost","id":7,"at_ms":12}"#;
        let read: Event = serde_json::from_str(text).unwrap();
        assert!(matches!(read, Event::SamplesMoved { samples: 3, kept_tokens: 21, .. }));
        let serving = r#"{"event":"engine_serving","engine":"e1","probe":"first",
            "version":{"epoch":0,"number":4,"root":"00"},"id":8,"at_ms":13}"#;
        let read: Event = serde_json::from_str(serving).unwrap();
        let version = Version { number: 4 };
        assert_eq!(read, Event::EngineServing { engine: "e1".into(), version });
        let other = r#"{"event":"batch_acked","seq":9,"id":8,"at_ms":13}"#;
        assert_eq!(serde_json::from_str::<Event>(other).unwrap(), Event::Other);
    }
}
