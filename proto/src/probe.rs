//! Probes: after each load an engine computes the log-probabilities of fixed ids, and they are compared
//! with a replica's at the same version and with the engine's own at the version before.

use serde::{Deserialize, Serialize};

use crate::invalid::Invalid;
use crate::pb;
use crate::wire_enum::{wire, words};

/// Probe of one engine at one version.
#[derive(Clone, Debug, PartialEq)]
pub struct ProbeResult {
    /// Token ids that were given.
    pub ids: Vec<u32>,
    /// Log-probabilities of the ids, natural logarithm.
    pub logprobs: Vec<f32>,
    /// Outcome of the comparison.
    pub verdict: Verdict,
}

/// Outcome of comparing a probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Equal to the reference replica's, within 1e-4.
    Agrees,
    /// Different from the engine's own at the version before; there was no replica to compare with.
    First,
    /// Equal to the engine's own at the version before. Recorded, but no proof.
    Inconclusive,
    /// Different from the reference replica's: the load is refused.
    Disagrees,
}

words!(Verdict, "verdict", {
    Agrees => "agrees", First => "first", Inconclusive => "inconclusive", Disagrees => "disagrees",
});
wire!(Verdict, pb::probe::Verdict, "probe.verdict", {
    Agrees => Agrees, First => First, Inconclusive => Inconclusive, Disagrees => Disagrees,
});

// === impl ProbeResult ===

impl TryFrom<pb::Probe> for ProbeResult {
    type Error = Invalid;

    /// Refuses a probe without a verdict, and a log-probability that is not a number.
    fn try_from(wire: pb::Probe) -> Result<Self, Invalid> {
        let verdict = Verdict::required("probe.verdict", wire.verdict)?;
        if let Some(at) = wire.logprobs.iter().position(|value| value.is_nan()) {
            let what = format!("number {at} (from 0) is not a number; the engine computed NaN");
            return Err(Invalid::rule("probe.logprobs", what));
        }
        Ok(Self { ids: wire.ids, logprobs: wire.logprobs, verdict })
    }
}

impl From<ProbeResult> for pb::Probe {
    fn from(probe: ProbeResult) -> Self {
        let verdict = pb::probe::Verdict::from(probe.verdict);
        Self { ids: probe.ids, logprobs: probe.logprobs, verdict: verdict.into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_probe_goes_over_the_wire_and_back_unless_it_says_nothing() {
        for verdict in Verdict::ALL {
            let probe = ProbeResult { ids: vec![1], logprobs: vec![-0.5], verdict: *verdict };
            assert_eq!(ProbeResult::try_from(pb::Probe::from(probe.clone())), Ok(probe));
        }
        let refused = |logprob, verdict| {
            let wire = pb::Probe { ids: vec![1], logprobs: vec![logprob], verdict };
            ProbeResult::try_from(wire).expect_err("refused").to_string()
        };
        assert!(refused(-0.5, 0).starts_with("probe.verdict: 0 is unknown: agrees, first"));
        assert!(
            refused(f32::NAN, 1).starts_with("probe.logprobs: number 0 (from 0) is not a number")
        );
    }
}
