//! Actions of the core, as the fleet and the trainer need them. The one file here that reads the manager's action
//! types, besides the world, which hands them on.

pub use anabranch_manager::action::{
    Action, Answer, FailKind, LoadOrder, ModeKind, Notice, StartOrder, SubmitVerdict,
};

/// The reason of a `SamplesMoved` notice when an engine was lost.
const LOST: &str = "engine lost";

/// Count of what one event moved, by the actions that it led to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Moved {
    /// Samples and loads that changed their place: what the event may look at without costing more in a larger fleet.
    pub entities: u64,
    /// Samples that an engine's loss took along.
    pub lost: u32,
    /// A version became current in it.
    pub current: bool,
}

pub fn moved(actions: &[Action]) -> Moved {
    let mut moved = Moved::default();
    // A sample that leaves an engine is stopped there, or told as moved, or both: it counts once.
    let (mut stopped, mut told) = (0, 0);
    for action in actions {
        match action {
            Action::Stop { .. } => stopped += 1,
            Action::Emit(Notice::SamplesMoved { samples, why, .. }) => {
                told += u64::from(*samples);
                moved.lost += if why == LOST { *samples } else { 0 };
            }
            Action::Emit(Notice::VersionCurrent { .. }) => moved.current = true,
            other => moved.entities += carried(other),
        }
    }
    moved.entities += stopped.max(told);
    moved
}

/// Samples or loads that one action carries.
fn carried(action: &Action) -> u64 {
    match action {
        Action::Forget { samples } => samples.len() as u64,
        Action::Deliver { samples, .. } => samples.len() as u64,
        Action::Emit(Notice::BatchOffered { samples, .. }) => u64::from(*samples),
        Action::Start(_)
        | Action::ClearPage { .. }
        | Action::FreezePage { .. }
        | Action::OrderLoad(_)
        | Action::CancelLoad { .. }
        | Action::OrderMode { .. } => 1,
        _ => 0,
    }
}

/// An answer that the bench's trainer never earns, or a notice of a sample that is not delivered: the run is not what
/// it says it is.
pub fn trouble(action: &Action) -> Option<String> {
    match action {
        Action::Reply { answer: Answer::Failed { why, kind }, .. }
            if *kind != FailKind::Unavailable =>
        {
            Some(format!("the core refused: {why}"))
        }
        Action::Reply { answer: Answer::Submitted(results), .. } => {
            let refused = results.iter().find(|r| r.verdict != SubmitVerdict::Accepted)?;
            Some(format!("group {} was not accepted: {:?}", refused.key, refused.verdict))
        }
        Action::Refuse { why, .. } => Some(format!("an engine was refused: {why}")),
        Action::CloseConsumer { why, .. } => Some(format!("the consumer was closed: {why}")),
        Action::Emit(notice) => match notice {
            Notice::PeerMisbehaved { .. }
            | Notice::SampleAbandoned { .. }
            | Notice::EngineQuarantined { .. } => Some(format!("{notice:?}")),
            _ => None,
        },
        _ => None,
    }
}
