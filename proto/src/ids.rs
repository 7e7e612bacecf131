//! Identifiers. Each is a newtype, so that two kinds of number cannot be swapped. All are unique within
//! one (job, epoch).

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// Name of an engine, stable over restarts.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct EngineId(Arc<str>);

/// One life of an engine process. A restart is a new one; messages from an older one are refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Incarnation(pub u64);

/// One attachment of an agent or a trainer; it survives a lost link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SessionId(pub u64);

/// Number of a prompt group, given by the manager in the order of admission.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct GroupId(pub u64);

/// Identity of one of a group's `n` samples.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SampleId {
    /// Group that the sample belongs to.
    pub group: GroupId,
    /// Number of the sample in its group, from 0.
    pub index: u32,
}

/// Placement number of a sample, from 1. What an engine says about an earlier attempt is refused.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, Default,
)]
pub struct Attempt(pub u32);

/// Sequence number of a micro-batch in its job, from 1; 0 stands for "none yet".
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, Default,
)]
pub struct BatchSeq(pub u64);

/// Number of an order to an agent (load, mode), unique within one life of the manager.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct OrderId(pub u64);

/// Number of a training step, given by the trainer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Step(pub u64);

// === impl EngineId ===

impl EngineId {
    /// Id with the text `id`; [`crate::word::check_name`] tells whether a manager takes it.
    pub fn new(id: &str) -> Self {
        Self(Arc::from(id))
    }

    /// Text of the id.
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
    /// Sample `index` of group number `group`.
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

// === impl Step, BatchSeq ===

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl From<u64> for Step {
    fn from(number: u64) -> Self {
        Self(number)
    }
}

impl fmt::Display for BatchSeq {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl From<u64> for BatchSeq {
    fn from(number: u64) -> Self {
        Self(number)
    }
}
