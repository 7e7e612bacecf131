//! Identifiers. Newtypes, so that two kinds of number cannot be swapped; all are scoped by (job, epoch).

use std::fmt;
use std::sync::Arc;

use serde::Serialize;

/// An engine's name, stable over restarts.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct EngineId(Arc<str>);

/// One life of an engine process: a restart is a new one, and messages from an older one are fenced off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct Incarnation(pub u64);

/// One attachment of an agent; it survives a lost link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct SessionId(pub u64);

/// A prompt group, numbered by the manager in the order of admission.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct GroupId(pub u64);

/// One of a group's `n` samples.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct SampleId {
    pub group: GroupId,
    pub index: u32,
}

/// The how-manieth placement of a sample, from 1. Fences off the engines it ran on before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Default)]
pub struct Attempt(pub u32);

/// A micro-batch's place in the job's sequence, from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Default)]
pub struct BatchSeq(pub u64);

/// An order to an agent (load, mode), unique within one life of the manager.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct OrderId(pub u64);

/// A training step, numbered by the trainer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct Step(pub u64);

// === impl EngineId ===

impl EngineId {
    pub fn new(id: &str) -> Self {
        Self(Arc::from(id))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for EngineId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

// === impl SampleId ===

impl SampleId {
    pub fn new(group: u64, index: u32) -> Self {
        Self { group: GroupId(group), index }
    }
}

impl fmt::Display for SampleId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "g{}/{}", self.group.0, self.index)
    }
}

impl From<SampleId> for crate::pb::Sample {
    fn from(id: SampleId) -> Self {
        Self { group: id.group.0, index: id.index }
    }
}

impl From<crate::pb::Sample> for SampleId {
    fn from(pb: crate::pb::Sample) -> Self {
        Self::new(pb.group, pb.index)
    }
}
