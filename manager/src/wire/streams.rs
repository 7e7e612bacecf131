//! Streams: the driver's ends of the streams to agents, consumers and publishers, and what each was sent.

pub(crate) mod consumers;
pub(crate) mod sessions;

use anabranch_proto::pb;
use tokio::sync::mpsc;
use tonic::Status;

use crate::action::VersionStatus;

/// The sending end of a stream to an agent or a trainer.
pub(crate) type Out<T> = mpsc::Sender<Result<T, Status>>;

/// The peer does not take what it is sent.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Overflow;

/// What a Publish stream is told.
pub(crate) enum ToPublisher {
    Status(VersionStatus),
    Dial(pb::publish_event::DialReceiver),
}
