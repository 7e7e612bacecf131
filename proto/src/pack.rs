//! Packing: how finished samples are cut into micro-batches, and which part of each a process takes.

use std::time::Duration;

use crate::invalid::Invalid;
use crate::limits::MAX_SHARDS;
use crate::millis::{millis, optional};
use crate::pb;

/// Rules for cutting a step's finished samples into micro-batches. One rule holds for all shards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pack {
    /// Samples of a batch over all shards, at least 1. Default 1.
    pub min: u32,
    /// Divisor of a batch's samples, at least 1; the rest goes into the step's next batch. Default 1.
    pub multiple_of: u32,
    /// The samples of a group come in one batch. Default false.
    pub whole_groups: bool,
    /// Time after which a batch below `min` is sent. Default `None`: never. The wire carries it in ms.
    pub max_wait: Option<Duration>,
}

/// Part of every batch that one process takes. All shards see the same sequence of batches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Shard {
    /// Number of this shard, from 0.
    pub index: u32,
    /// Number of shards, from 1 to [`MAX_SHARDS`].
    pub count: u32,
}

// === impl Pack ===

impl Default for Pack {
    fn default() -> Self {
        Self { min: 1, multiple_of: 1, whole_groups: false, max_wait: None }
    }
}

impl From<pb::Pack> for Pack {
    /// Takes 0 for 1 in both counts.
    fn from(wire: pb::Pack) -> Self {
        Self {
            min: wire.min.max(1),
            multiple_of: wire.multiple_of.max(1),
            whole_groups: wire.whole_groups,
            max_wait: optional(wire.max_wait_ms),
        }
    }
}

impl From<Pack> for pb::Pack {
    fn from(pack: Pack) -> Self {
        Self {
            min: pack.min,
            multiple_of: pack.multiple_of,
            whole_groups: pack.whole_groups,
            max_wait_ms: pack.max_wait.map_or(0, millis),
        }
    }
}

// === impl Shard ===

impl Shard {
    /// The only shard: one process takes everything.
    pub const ALL: Self = Self { index: 0, count: 1 };

    /// Shard `index` of `count`; a count of 0 means 1.
    pub fn new(index: u32, count: u32) -> Result<Self, Invalid> {
        let shard = Self { index, count: count.max(1) };
        shard.check()?;
        Ok(shard)
    }

    /// Refuses an index that is not below the count, and a count that is 0 or above [`MAX_SHARDS`].
    pub fn check(self) -> Result<(), Invalid> {
        let Self { index, count } = self;
        if index < count && count <= MAX_SHARDS {
            return Ok(());
        }
        let what = format!(
            "{index} of {count} does not exist: the index starts at 0, at most {MAX_SHARDS} shards"
        );
        Err(Invalid::rule("shard_index", what))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pack_goes_over_the_wire_and_back() {
        let wait = Some(Duration::from_millis(20));
        let pack = Pack { min: 8, multiple_of: 4, whole_groups: true, max_wait: wait };
        assert_eq!(Pack::from(pb::Pack::from(pack)), pack);
        assert_eq!(Pack::from(pb::Pack::default()), Pack::default());
    }

    #[test]
    fn shards_are_counted_from_zero() {
        assert_eq!(Shard::new(0, 0), Ok(Shard::ALL));
        assert_eq!(Shard::new(3, 4), Ok(Shard { index: 3, count: 4 }));
        for (index, count) in [(4, 4), (1, 0), (0, MAX_SHARDS + 1)] {
            let says = format!("shard_index: {index} of {} does not exist", count.max(1));
            let error = Shard::new(index, count).expect_err("refused").to_string();
            assert!(error.starts_with(&says), "{error}");
        }
        assert!(Shard { index: 0, count: 0 }.check().is_err());
    }
}
