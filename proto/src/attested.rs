//! Attestation: whose word it is that an engine ran the weights which a span of tokens is labelled with.

use serde::{Deserialize, Serialize};

use crate::pb;
use crate::wire_enum::{wire, words};

/// Source of the label of a span's weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AttestedBy {
    /// Our transfer: every chunk was verified, the root sealed, the version loaded and probed.
    Transfer,
    /// The trainer, which loaded the weights itself and said so.
    Trainer,
    /// The engine: the weights that it was started with.
    Engine,
}

words!(AttestedBy, "attested_by", {
    Transfer => "transfer", Trainer => "trainer", Engine => "engine",
});
wire!(AttestedBy, pb::AttestedBy, "attested_by", {
    Transfer => Transfer, Trainer => Trainer, Engine => Engine,
});
