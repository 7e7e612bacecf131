//! Words of a world: what is on its way, and whose answer is waited for.

use std::time::Duration;

use anabranch_manager::action::{Answer, Batch, LoadOrder, ModeKind, StartOrder};
use anabranch_manager::event::{ConsumerId, Event, Held, LinkId, ReplyTo};
use anabranch_proto::{Attempt, OrderId, SampleId, SessionId, Version, pb};
use anabranch_runtime::clock::Now;
use bytes::Bytes;

/// Messages on their way, and timers.
pub(crate) enum Happening {
    Core(Event),
    /// A tick arrives over this link.
    Tick {
        link: LinkId,
        session: SessionId,
        tick: pb::Tick,
    },
    ToAgent {
        engine: usize,
        link: LinkId,
        message: ToAgent,
    },
    Make {
        engine: usize,
    },
    Redial {
        engine: usize,
    },
    Reborn {
        engine: usize,
    },
    /// The notice of the machine is over: the machine is gone.
    Preempted {
        engine: usize,
    },
    NetUp {
        engine: usize,
    },
    Recover {
        engine: usize,
    },
    LoadStep {
        engine: usize,
        incarnation: u64,
        order: OrderId,
    },
    DrainOver {
        engine: usize,
        incarnation: u64,
        order: OrderId,
    },
    Strike,
    OpenJob,
    Submit {
        step: u64,
    },
    /// A publisher whose stream broke is back.
    Republish,
    Close,
    Publish,
    Consume {
        shard: u32,
    },
    Take {
        consumer: ConsumerId,
        batch: std::sync::Arc<Batch>,
        samples: Vec<usize>,
    },
    Done {
        consumer: ConsumerId,
        report: std::sync::Arc<anabranch_manager::action::StepReport>,
    },
    Answer {
        to: ReplyTo,
        answer: Answer,
    },
    Beats,
    /// The driver looks for silent samples.
    Sweep,
    /// The trainer has trained on a step, on its own GPUs.
    Trained {
        step: u64,
    },
}

pub(crate) enum ToAgent {
    Welcome { session: SessionId, acked: u64, keep: Vec<Held> },
    Start(Box<StartOrder>, Bytes),
    Stop { sample: SampleId, attempt: Attempt },
    Ack(u64),
    Load(Box<LoadOrder>),
    CancelLoad(OrderId),
    Mode { order: OrderId, mode: ModeKind, deadline: Duration },
    Closed { retry: Option<Duration> },
}

/// Request whose answer the trainer waits for.
pub(crate) enum Waiting {
    Open,
    Submit { step: u64 },
    Announce { version: Version, sender: u32, step: Option<u64> },
    Seal { version: Version, step: Option<u64> },
    Close,
    Train { step: u64, by: Now },
    Generate { step: u64, by: Now },
    Nothing,
}

impl Happening {
    /// True if the manager must run for it.
    pub fn is_for_manager(&self) -> bool {
        matches!(self, Self::Core(_) | Self::Tick { .. } | Self::Sweep)
    }
}
