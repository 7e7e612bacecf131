//! Held samples: what an agent and its manager compare when the agent attaches again.

use crate::ids::{Attempt, SampleId};
use crate::invalid::Invalid;
use crate::pb;

/// A sample that an agent still runs, or whose last tokens the manager has not acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// The sample.
    pub sample: SampleId,
    /// Attempt that the agent runs.
    pub attempt: Attempt,
    /// Number of tokens that the sample has, by the agent's count.
    pub upto: u32,
}

impl TryFrom<pb::Held> for Held {
    type Error = Invalid;

    fn try_from(wire: pb::Held) -> Result<Self, Invalid> {
        let missing = || Invalid::missing("held.sample", "name the sample that is held");
        let sample = wire.sample.ok_or_else(missing)?;
        Ok(Self { sample: sample.into(), attempt: Attempt(wire.attempt), upto: wire.upto })
    }
}

impl From<Held> for pb::Held {
    fn from(held: Held) -> Self {
        Self { sample: Some(held.sample.into()), attempt: held.attempt.0, upto: held.upto }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_held_sample_goes_over_the_wire_and_back_if_it_is_named() {
        let held = Held { sample: SampleId::new(4, 1), attempt: Attempt(2), upto: 9 };
        assert_eq!(Held::try_from(pb::Held::from(held)), Ok(held));
        let error = Held::try_from(pb::Held::default()).expect_err("nameless").to_string();
        assert_eq!(error, "held.sample: missing; name the sample that is held");
    }
}
