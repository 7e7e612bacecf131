//! Meaning of a log-probability. A job names one mode; an engine that cannot give it is refused.

use serde::{Deserialize, Serialize};

use crate::pb;
use crate::wire_enum::{wire, words};

/// Distribution that a token's log-probability is taken from (`logprobs_mode` in vLLM).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(rename_all = "snake_case")]
pub enum LogprobsMode {
    /// Log-softmax of the logits.
    Raw,
    /// Log-softmax after temperature, before top-p, top-k and min-p. The default.
    #[default]
    Tempered,
    /// Logarithm of the distribution that was sampled from, after all filters.
    Processed,
}

words!(LogprobsMode, "logprobs mode", {
    Raw => "raw", Tempered => "tempered", Processed => "processed",
});
wire!(LogprobsMode, pb::Convention, "convention", {
    Raw => Raw, Tempered => Tempered, Processed => Processed,
});
