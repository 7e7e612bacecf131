//! Change: one durable fact of a work stream, in plain ids and numbers. `Books::apply` folds changes.

use std::sync::Arc;

use anabranch_proto::{BatchSeq, GroupId, SampleId, Step, Version};

use super::group::GroupSpec;
use super::sample::SampleState;
use crate::action::ShortGroup;

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Change {
    /// A group was admitted whole.
    Admitted { group: GroupId, spec: Arc<GroupSpec> },
    /// The trainer named a step, and whether it has submitted all of the step.
    StepNamed { step: Step, is_final: bool },
    /// A sample moved along the edges of its graph.
    Moved { sample: SampleId, to: SampleState },
    /// A sample ends with `tokens` tokens: what was booked for more is given back.
    Made { sample: SampleId, tokens: u32 },
    /// A sample restarts from its prompt; `lost` tokens were thrown away.
    Restarted { sample: SampleId, lost: u32 },
    /// The first reason for which a group will be short.
    Shortened { group: GroupId, why: Arc<str> },
    /// A group's first sample is ready for a batch while `at` is current.
    Offered { group: GroupId, at: Version },
    /// The last open sample of a group has ended; `short` where not all samples will be delivered.
    GroupEnded { group: GroupId, short: Option<ShortGroup> },
    /// A group whose samples had all ended is taken back: nothing more of it will be delivered.
    GroupDropped { group: GroupId, report: ShortGroup },
    /// A batch has its number and its members.
    BatchCut { seq: BatchSeq, batch: BatchBook },
    /// The last batch of a step was cut.
    StepOver { step: Step },
    /// The trainer consumes in `count` shards from now on. Where it consumed in another number before, what is not
    /// committed is offered again: a shard of two has other samples than a shard of four.
    Sharded { count: u32 },
    /// A shard has received everything up to `seq`.
    Acked { shard: u32, seq: BatchSeq },
    /// A shard has everything up to `seq` in a checkpoint.
    Committed { shard: u32, seq: BatchSeq },
    /// The trainer restarted from a checkpoint that holds everything up to `cursor`.
    Rewound { cursor: BatchSeq },
    /// Every shard has committed this batch: its samples are forgotten, and what ends with them.
    BatchForgotten { seq: BatchSeq },
    /// Everything up to `floor` is committed by every shard.
    FloorRaised { floor: BatchSeq },
    /// Another epoch of the same job: keys of forgotten groups and past steps may come again.
    EpochBegun,
    /// Another job: nothing of the old one stays.
    Cleared,
}

/// Members and sums of a micro-batch, from its cut to its commit.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct BatchBook {
    pub step: Step,
    pub last_of_step: bool,
    pub samples: Vec<SampleId>,
    pub tokens: u64,
    /// Largest lag of any token in the batch, in versions.
    pub max_lag: u64,
}
