//! Capabilities of an engine, which its agent tells the manager when it attaches.

use crate::invalid::Invalid;
use crate::logprobs::LogprobsMode;
use crate::pb;
use crate::seed::SeedKeying;

/// Capabilities of one engine. The manager refuses an engine that cannot do what its job needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caps {
    /// How the engine's random numbers depend on the seed.
    pub seed_keying: SeedKeying,
    /// Meanings of a log-probability that the engine can give, at least one.
    pub logprobs_modes: Vec<LogprobsMode>,
    /// The engine itself reports which version made which tokens.
    pub spans: bool,
    /// Names of the per-token extras that the engine can give.
    pub columns: Vec<String>,
    /// Ways to pause that the engine knows.
    pub pause_modes: Vec<String>,
    /// The engine can give its GPU memory back, and take it again.
    pub release_memory: bool,
    /// The trainer loads the engine and attests its version; the engine never gets a load order.
    pub weights_by_trainer: bool,
}

// === impl Caps ===

impl Caps {
    /// An engine that keys its random numbers so, gives these log-probabilities, and nothing else.
    pub fn new(seed_keying: SeedKeying, logprobs_modes: Vec<LogprobsMode>) -> Self {
        Self {
            seed_keying,
            logprobs_modes,
            spans: false,
            columns: Vec::new(),
            pause_modes: Vec::new(),
            release_memory: false,
            weights_by_trainer: false,
        }
    }
}

impl TryFrom<pb::Caps> for Caps {
    type Error = Invalid;

    /// Refuses unknown codes, and an engine that gives no log-probabilities.
    fn try_from(wire: pb::Caps) -> Result<Self, Invalid> {
        let field = "caps.logprob_conventions";
        if wire.logprob_conventions.is_empty() {
            let what = "must name at least one: a trajectory without log-probabilities cannot be \
                        trained on";
            return Err(Invalid::rule(field, what));
        }
        let mode = |code: &i32| LogprobsMode::required(field, *code);
        Ok(Self {
            seed_keying: SeedKeying::required("caps.seed_keying", wire.seed_keying)?,
            logprobs_modes: wire.logprob_conventions.iter().map(mode).collect::<Result<_, _>>()?,
            spans: wire.spans,
            columns: wire.columns,
            pause_modes: wire.pause_modes,
            release_memory: wire.release_memory,
            weights_by_trainer: wire.weights_by_trainer,
        })
    }
}

impl From<Caps> for pb::Caps {
    fn from(caps: Caps) -> Self {
        let modes = caps.logprobs_modes.into_iter();
        Self {
            seed_keying: pb::caps::SeedKeying::from(caps.seed_keying).into(),
            logprob_conventions: modes.map(|mode| pb::Convention::from(mode).into()).collect(),
            spans: caps.spans,
            columns: caps.columns,
            adapters: Vec::new(),
            modalities: Vec::new(),
            pause_modes: caps.pause_modes,
            release_memory: caps.release_memory,
            weights_by_trainer: caps.weights_by_trainer,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn caps() -> Caps {
        Caps {
            seed_keying: SeedKeying::Stream,
            logprobs_modes: vec![LogprobsMode::Raw, LogprobsMode::Processed],
            spans: true,
            columns: vec!["experts".into()],
            pause_modes: vec!["abort".into()],
            release_memory: true,
            weights_by_trainer: false,
        }
    }

    #[test]
    fn capabilities_go_over_the_wire_and_back() {
        assert_eq!(Caps::try_from(pb::Caps::from(caps())), Ok(caps()));
    }

    #[test]
    fn an_engine_without_log_probabilities_or_with_unknown_codes_is_refused() {
        let refused = |change: fn(&mut pb::Caps)| {
            let mut wire = pb::Caps::from(caps());
            change(&mut wire);
            Caps::try_from(wire).expect_err("refused").to_string()
        };
        let none = refused(|caps| caps.logprob_conventions.clear());
        assert!(none.starts_with("caps.logprob_conventions: must name at least one"), "{none}");
        assert_eq!(
            refused(|caps| caps.logprob_conventions = vec![9]),
            "caps.logprob_conventions: 9 is unknown: raw, tempered or processed"
        );
        assert_eq!(
            refused(|caps| caps.seed_keying = 0),
            "caps.seed_keying: 0 is unknown: absolute_position, stream or unkeyed"
        );
    }
}
