//! The vocabulary and the wire of Anabranch: each concept once, with its bounds, its protobuf conversion
//! and its documentation, and the generated messages. Does no I/O, spawns nothing, reads no clock.
//!
//! Messages ([`pb`]) stay in the folders that talk to a peer. Everything else uses the types of this crate:
//! reading a message is a `TryFrom`, whose error ([`Invalid`]) names the field, the value, the bound and
//! the remedy; writing one is an `Into`. A bound that two places check is checked by one function here.
//!
//! In reading order:
#![warn(missing_docs)]

// names
pub mod ids;
pub mod version;
pub mod word;
// bounds and errors
pub mod invalid;
pub mod limits;
mod wire_enum;
// work
pub mod caps;
pub mod finish;
pub mod logprobs;
pub mod model;
pub mod pack;
pub mod sampling;
pub mod seed;
pub mod staleness;
// weights
pub mod address;
pub mod attested;
pub mod grant;
pub mod manifest;
pub mod probe;
pub mod roll;
pub mod sender;
pub mod stage;
// the wire
pub mod held;
pub mod millis;
pub mod pb;
pub mod protocol;
pub mod tokens;

pub use attested::AttestedBy;
pub use caps::Caps;
pub use finish::Finish;
pub use held::Held;
pub use ids::{
    Attempt, BatchSeq, EngineId, GroupId, Incarnation, OrderId, SampleId, SessionId, Step,
};
pub use invalid::{Fault, Invalid};
pub use logprobs::LogprobsMode;
pub use model::Model;
pub use pack::{Pack, Shard};
pub use probe::{ProbeResult, Verdict};
pub use roll::Roll;
pub use sampling::{Replay, Sampling};
pub use seed::SeedKeying;
pub use sender::SenderOf;
pub use stage::{LoadStage, VersionState};
pub use staleness::{OnExceed, OnRunning, Staleness};
pub use version::{Root, Version};
