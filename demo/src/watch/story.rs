//! The events as a story: each engine's life, each version's roll-out, each move of samples.

use std::collections::BTreeMap;

use anabranch_proto::{EngineId, LoadStage, Version};
use anabranch_views::Notice;

use crate::report::Phase;

/// The events of the run, by engine and by version. All times are seconds since the demo began.
#[derive(Debug, Clone, Default)]
pub struct Story {
    /// Each engine's life, by id.
    pub engines: BTreeMap<String, EngineStory>,
    /// Each version's roll-out, by number.
    pub versions: BTreeMap<u64, VersionStory>,
    /// Moves of samples, in their order.
    pub moves: Vec<Move>,
    /// Things that should not have happened, in the words that the user sees.
    pub complaints: Vec<String>,
    /// Events that the manager dropped because this stream was too slow.
    pub missed_events: u64,
}

/// One engine's life.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct EngineStory {
    /// Time at which the engine attached.
    pub joined_s: f64,
    /// True if the engine runs on the trainer's GPU.
    pub colocated: bool,
    /// Each phase with the time at which it began.
    pub phases: Vec<(f64, Phase)>,
    /// Time at which the engine left, and why.
    pub left: Option<(f64, String)>,
    /// Times that the agent let the engine answer the fixed prompt: at attach and after each load.
    pub probes: u64,
}

/// One version's roll-out.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct VersionStory {
    /// Size of the version in bytes.
    pub bytes: u64,
    /// Time at which the trainer announced the version.
    pub announced_s: f64,
    /// Time at which the version was sealed.
    pub sealed_s: Option<f64>,
    /// Time at which the version became the current one.
    pub current_s: Option<f64>,
    /// Time at which every engine served the version.
    pub settled_s: Option<f64>,
    /// Time at which each engine served the version, by engine.
    pub active_s: BTreeMap<String, f64>,
}

/// One move of samples away from an engine.
#[derive(Debug, Clone, PartialEq)]
pub struct Move {
    /// Time of the move.
    pub at_s: f64,
    /// Id of the engine that the samples left.
    pub from: String,
    /// Number of samples.
    pub samples: u64,
    /// Tokens that the samples keep.
    pub kept_tokens: u64,
    /// Reason of the move.
    pub why: String,
}

impl Story {
    pub(super) fn hear(&mut self, at_s: f64, notice: Notice) {
        match notice {
            Notice::EngineAttached { engine, colocated, .. } => {
                self.attached(at_s, &engine, colocated)
            }
            Notice::EngineServing { engine, version, .. } => self.serving(at_s, &engine, version),
            Notice::EngineReleased { engine } => self.enter(at_s, &engine, Phase::Released),
            Notice::EngineDraining { engine, .. } => self.enter(at_s, &engine, Phase::Draining),
            Notice::EngineSuspect { engine, why, .. } => {
                self.enter(at_s, &engine, Phase::Suspect);
                self.complaints.push(format!("{engine} is suspect: {why}"));
            }
            Notice::EngineGone { engine, why } => {
                self.engine(at_s, &engine).left = Some((at_s, why));
            }
            Notice::SamplesMoved { from, samples, kept_tokens, why } => {
                let (from, samples) = (from.to_string(), samples.into());
                self.moves.push(Move { at_s, from, samples, kept_tokens, why });
            }
            Notice::EngineQuarantined { engine, why, .. } => {
                self.complaints.push(format!("{engine} is quarantined: {why}"));
            }
            Notice::EngineRefused { engine, why } => {
                self.complaints.push(format!("{engine} was refused: {why}"));
            }
            Notice::SampleAbandoned { key, why, .. } => {
                self.complaints.push(format!("a sample of {key} was abandoned: {why}"));
            }
            Notice::PeerMisbehaved { engine, what } => {
                self.complaints.push(format!("{engine} broke the protocol: {what}"));
            }
            Notice::Missed { events } => self.missed_events += events,
            other => self.hear_of_version(at_s, other),
        }
    }

    fn hear_of_version(&mut self, at_s: f64, notice: Notice) {
        match notice {
            Notice::VersionAnnounced { version, bytes } => {
                let story = VersionStory { bytes, announced_s: at_s, ..VersionStory::default() };
                self.versions.insert(version.number, story);
            }
            Notice::VersionAvailable { version } => self.version(version).sealed_s = Some(at_s),
            Notice::VersionCurrent { version, .. } => self.version(version).current_s = Some(at_s),
            Notice::VersionSettled { version, .. } => self.version(version).settled_s = Some(at_s),
            Notice::LoadStage { engine, version, stage, error, .. } => match stage {
                LoadStage::Quiescing => {
                    self.enter(at_s, &engine, Phase::Loading { version: version.number });
                }
                LoadStage::Probing => self.engine(at_s, &engine).probes += 1,
                LoadStage::Failed => {
                    let number = version.number;
                    self.complaints.push(format!("{engine} could not load v{number}: {error}"));
                }
                _ => {}
            },
            _ => {}
        }
    }

    fn attached(&mut self, at_s: f64, engine: &EngineId, colocated: bool) {
        let phases = vec![(at_s, Phase::Joining)];
        let story = EngineStory { joined_s: at_s, colocated, phases, left: None, probes: 1 };
        self.engines.insert(engine.to_string(), story);
    }

    fn serving(&mut self, at_s: f64, engine: &EngineId, version: Version) {
        let number = version.number;
        self.enter(at_s, engine, Phase::Serving { version: number });
        if let Some(story) = self.versions.get_mut(&number) {
            story.active_s.entry(engine.to_string()).or_insert(at_s);
        }
    }

    fn enter(&mut self, at_s: f64, engine: &EngineId, phase: Phase) {
        let phases = &mut self.engine(at_s, engine).phases;
        if phases.last().is_none_or(|(_, last)| *last != phase) {
            phases.push((at_s, phase));
        }
    }

    fn engine(&mut self, at_s: f64, id: &EngineId) -> &mut EngineStory {
        self.engines
            .entry(id.to_string())
            .or_insert_with(|| EngineStory { joined_s: at_s, ..EngineStory::default() })
    }

    fn version(&mut self, version: Version) -> &mut VersionStory {
        self.versions.entry(version.number).or_default()
    }

    /// Samples and kept tokens that left `engine` after `since_s`.
    pub fn moved_off(&self, engine: &str, since_s: f64) -> (u64, u64) {
        let moved = self.moves.iter().filter(|m| m.from == engine && m.at_s >= since_s);
        moved.fold((0, 0), |(samples, tokens), m| (samples + m.samples, tokens + m.kept_tokens))
    }

    /// True if `engine` was there and has left.
    pub fn is_gone(&self, engine: &str) -> bool {
        self.engines.get(engine).is_some_and(|story| story.left.is_some())
    }

    /// True if `engine` is there and serves a version.
    pub fn is_serving(&self, engine: &str) -> bool {
        let serves = |story: &EngineStory| matches!(story.phase(), Some(Phase::Serving { .. }));
        self.engines.get(engine).is_some_and(|story| story.left.is_none() && serves(story))
    }

    /// True if every engine that is there serves version `number`.
    pub fn all_serve(&self, number: u64) -> bool {
        let mut here = self.engines.values().filter(|engine| engine.left.is_none());
        here.all(|engine| engine.phase() == Some(Phase::Serving { version: number }))
    }
}

impl EngineStory {
    /// The engine's current phase; `None` before the first.
    pub fn phase(&self) -> Option<Phase> {
        self.phases.last().map(|(_, phase)| *phase)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use anabranch_proto::Incarnation;

    fn told(notices: Vec<Notice>) -> Story {
        let mut story = Story::default();
        for (at, notice) in notices.into_iter().enumerate() {
            story.hear(at as f64, notice);
        }
        story
    }

    #[test]
    fn an_engines_life_and_its_versions_are_kept_in_order() {
        let v = |number| Version { number, ..Version::default() };
        let engine = || EngineId::new("e1");
        let serving = |version| Notice::EngineServing { engine: engine(), version, probe: None };
        let moved = |samples, kept_tokens| {
            let why = "x".into();
            Notice::SamplesMoved { from: engine(), samples, kept_tokens, why }
        };
        let story = told(vec![
            Notice::EngineAttached {
                engine: engine(),
                incarnation: Incarnation(1),
                kind: String::new(),
                kv_tokens: 0,
                colocated: false,
            },
            serving(v(0)),
            Notice::VersionAnnounced { version: v(1), bytes: 10 },
            Notice::VersionAvailable { version: v(1) },
            Notice::LoadStage {
                engine: engine(),
                version: v(1),
                stage: LoadStage::Quiescing,
                bytes: 10,
                ms: 5,
                error: String::new(),
                fetched_from: BTreeMap::new(),
            },
            serving(v(1)),
            moved(2, 9),
            moved(1, 4),
            Notice::EngineGone { engine: engine(), why: "killed".into() },
        ]);
        let e1 = &story.engines["e1"];
        let phases: Vec<Phase> = e1.phases.iter().map(|(_, phase)| *phase).collect();
        let serving = |version| Phase::Serving { version };
        assert_eq!(phases, [Phase::Joining, serving(0), Phase::Loading { version: 1 }, serving(1)]);
        assert_eq!(story.versions[&1].active_s["e1"], 5.0);
        assert_eq!(story.moved_off("e1", 7.0), (1, 4));
        assert!(story.is_gone("e1") && !story.is_serving("e1"));
    }

    #[test]
    fn what_should_not_happen_is_a_complaint() {
        let story = told(vec![
            Notice::SampleAbandoned {
                sample: "g1/0".into(),
                key: "k".into(),
                why: "poison".into(),
            },
            Notice::EngineSuspect { engine: EngineId::new("e1"), why: "silent".into(), running: 0 },
        ]);
        assert_eq!(story.complaints.len(), 2);
    }
}
