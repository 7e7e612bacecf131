//! Rows that are variants of an enum. Their names are those of the variants.

use anabranch_manager::action::{Action, Answer, Notice};
use anabranch_manager::event::Event;
use anabranch_manager::ledger::Fact;

/// Makes a function from a value to its variant's name, and the list of all names. The match has no `_`, so a new
/// variant does not compile before it is listed.
macro_rules! names {
    ($name:ident, $all:ident, $of:ident, $($variant:ident)*) => {
        const $all: &[&str] = &[$(stringify!($variant)),*];

        pub(super) fn $name(value: &$of) -> &'static str {
            match value {
                $($of::$variant { .. } => stringify!($variant),)*
            }
        }
    };
}

/// All names, by section of the table.
pub(super) const ALL: &[(&str, &[&str])] = &[
    ("event", EVENTS),
    ("fact", FACTS),
    ("action", ACTIONS),
    ("answer", ANSWERS),
    ("notice", NOTICES),
];

names! { event, EVENTS, Event,
    JobOpened TrainerHeard JobClosed GroupsSubmitted GroupsCancelled ConsumerAttached ConsumerLost CreditGranted
    BatchAcked BatchCommitted ModeRequested EngineReported VersionAnnounced VersionSealed PublisherLost
    EngineAttached LinkLost EngineHeard EngineBeat EngineDied PreemptionNoticed LoadReported ModeReported
    FactsFound SilenceFound PageCleared PageFrozen DrainRequested RemoveRequested TimePassed
}

names! { fact, FACTS, Fact, Grew Finished Ended }

names! { action, ACTIONS, Action,
    OpenPage Start ClearPage FreezePage Forget Welcome Refuse EndSession Stop ForgetPrompt OrderLoad CancelLoad
    OrderMode Reply Deliver StepDone CloseConsumer DialReceiver TellPublisher Emit
}

names! { answer, ANSWERS, Answer, Opened Submitted Cancelled ModeSet Done Said Failed }

names! { notice, NOTICES, Notice,
    JobOpened TrainerLost EngineAttached EngineRefused EngineReattached EngineSuspect EngineServing
    EngineDraining EngineReleased EngineGone EngineQuarantined SamplesMoved SamplesPlaced SampleHeld
    SampleAbandoned VersionAnnounced VersionAvailable VersionCurrent VersionSettled LoadOrdered LoadStage
    StepSubmitted BatchOffered BatchAcked StepDone ModeSwitched PeerMisbehaved Missed Unknown
}
