//! Staleness: how old the weights of a delivered token may be, and what a new version does to the samples
//! that run.

use serde::{Deserialize, Serialize};

use crate::invalid::Invalid;
use crate::pb;
use crate::wire_enum::{wire, words};

/// Bound on the lag of delivered tokens, chosen per job.
///
/// The lag of a token is (version current when its group was first offered) - (its own version), in
/// versions of one epoch. The default is on-policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Staleness {
    /// Highest lag, in versions. `Some(0)` is on-policy, `None` unbounded. The wire carries 32 bits.
    pub max_lag: Option<u64>,
    /// Fate of samples that a new version would make too old.
    pub on_exceed: OnExceed,
}

/// Fate of unfinished samples whose tokens a new version would make older than the job's bound.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnExceed {
    /// The new version becomes current only after those groups were delivered. The default.
    #[default]
    Wait,
    /// Such samples restart from their prompt; their tokens are counted as discarded.
    Restart,
    /// Such groups are dropped, and reported when their step is done.
    Drop,
}

/// Effect of a new version on the samples that run on an engine which loads it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnRunning {
    /// The engine loads after they ended.
    Finish,
    /// The engine pauses them, loads, recomputes their KV cache, and continues with the new version.
    /// The default.
    #[default]
    Continue,
    /// The engine aborts them; they continue on another engine from the tokens they have.
    Abort,
}

words!(OnExceed, "on_exceed", { Wait => "wait", Restart => "restart", Drop => "drop" });
wire!(OnExceed, pb::staleness::OnExceed, "staleness.on_exceed", {
    Wait => Wait, Restart => Restart, Drop => Drop,
});
words!(OnRunning, "on_running", { Finish => "finish", Continue => "continue", Abort => "abort" });
wire!(OnRunning, pb::OnRunning, "on_running", {
    Finish => Finish, Continue => Continue, Abort => Abort,
});

// === impl Staleness ===

impl Staleness {
    /// Only tokens of the current version are delivered. A new version waits for older groups.
    pub const ON_POLICY: Self = Self::bounded(0);

    /// Tokens of any age are delivered.
    pub const UNBOUNDED: Self = Self { max_lag: None, on_exceed: OnExceed::Wait };

    /// Tokens up to `max_lag` versions old are delivered. A new version waits for older groups.
    pub const fn bounded(max_lag: u32) -> Self {
        Self { max_lag: Some(max_lag as u64), on_exceed: OnExceed::Wait }
    }

    /// The same bound with another fate for what would become too old.
    pub const fn on_exceed(mut self, on_exceed: OnExceed) -> Self {
        self.on_exceed = on_exceed;
        self
    }
}

impl Default for Staleness {
    fn default() -> Self {
        Self::ON_POLICY
    }
}

impl TryFrom<pb::Staleness> for Staleness {
    type Error = Invalid;

    /// Unspecified fields give on-policy and [`OnExceed::Wait`].
    fn try_from(wire: pb::Staleness) -> Result<Self, Invalid> {
        use pb::staleness::Kind;
        let max_lag = match Kind::try_from(wire.kind) {
            Ok(Kind::Unspecified | Kind::OnPolicy) => Some(0),
            Ok(Kind::Bounded) => Some(wire.max_lag.into()),
            Ok(Kind::Unbounded) => None,
            Err(_) => {
                let kinds = ["on_policy", "bounded", "unbounded"];
                return Err(Invalid::unknown("staleness.kind", wire.kind, &kinds));
            }
        };
        let on_exceed = OnExceed::from_wire("staleness.on_exceed", wire.on_exceed)?;
        Ok(Self { max_lag, on_exceed: on_exceed.unwrap_or_default() })
    }
}

impl From<Staleness> for pb::Staleness {
    fn from(staleness: Staleness) -> Self {
        use pb::staleness::Kind;
        let (kind, max_lag) = match staleness.max_lag {
            Some(0) => (Kind::OnPolicy, 0),
            Some(lag) => (Kind::Bounded, u32::try_from(lag).unwrap_or(u32::MAX)),
            None => (Kind::Unbounded, 0),
        };
        let on_exceed = pb::staleness::OnExceed::from(staleness.on_exceed);
        Self { kind: kind.into(), max_lag, on_exceed: on_exceed.into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bound_goes_over_the_wire_and_back() {
        for bound in [Staleness::ON_POLICY, Staleness::bounded(3), Staleness::UNBOUNDED] {
            for on_exceed in OnExceed::ALL {
                let said = bound.on_exceed(*on_exceed);
                assert_eq!(Staleness::try_from(pb::Staleness::from(said)), Ok(said));
            }
        }
        assert_eq!(Staleness::try_from(pb::Staleness::default()), Ok(Staleness::default()));
    }

    #[test]
    fn codes_of_a_newer_protocol_are_refused_with_the_known_words() {
        let kind = Staleness::try_from(pb::Staleness { kind: 9, ..Default::default() });
        assert_eq!(
            kind.expect_err("kind").to_string(),
            "staleness.kind: 9 is unknown: on_policy, bounded or unbounded"
        );
        let exceed = Staleness::try_from(pb::Staleness { on_exceed: 9, ..Default::default() });
        assert_eq!(
            exceed.expect_err("fate").to_string(),
            "staleness.on_exceed: 9 is unknown: wait, restart or drop"
        );
        let running = OnRunning::from_wire("on_running", 7).expect_err("running");
        assert_eq!(running.to_string(), "on_running: 7 is unknown: finish, continue or abort");
    }
}
