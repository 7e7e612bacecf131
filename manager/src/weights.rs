//! Weights: the versions of a lineage, who has them, and how they roll forward over the fleet.

pub mod plan;
pub(crate) mod rates;
pub(crate) mod rollforward;
pub mod versions;
