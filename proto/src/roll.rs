//! Roll-out policy: how many engines load a new version at the same time.

use crate::pb;

/// How the engines of a job take a new version. Default all at once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Roll {
    /// All engines load together.
    #[default]
    AllAtOnce,
    /// Engines load in waves.
    Rolling {
        /// Engines that serve at any time while others load.
        keep_serving: u32,
    },
}

// === impl Roll ===

impl Roll {
    /// Engines that keep serving while others load; `None` if all load at once.
    pub const fn keep_serving(self) -> Option<u32> {
        match self {
            Self::AllAtOnce => None,
            Self::Rolling { keep_serving } => Some(keep_serving),
        }
    }
}

impl From<pb::RollPolicy> for Roll {
    fn from(wire: pb::RollPolicy) -> Self {
        match wire.rolling {
            false => Self::AllAtOnce,
            true => Self::Rolling { keep_serving: wire.keep_serving },
        }
    }
}

impl From<Roll> for pb::RollPolicy {
    fn from(roll: Roll) -> Self {
        let keep_serving = roll.keep_serving();
        Self { rolling: keep_serving.is_some(), keep_serving: keep_serving.unwrap_or(0) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_policy_goes_over_the_wire_and_back() {
        for roll in [Roll::AllAtOnce, Roll::Rolling { keep_serving: 2 }] {
            assert_eq!(Roll::from(pb::RollPolicy::from(roll)), roll);
        }
    }
}
