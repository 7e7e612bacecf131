//! A stream that somebody opened to this listener, until it is known what is spoken on it.

use std::io;
use std::net::{Shutdown, TcpStream};
use std::time::Duration;

use super::Shared;
use crate::link::tcp;
use crate::link::wire::{FailCode, Message};
use crate::link::{Closer, Link};
use crate::send::listen::Door;

/// A peer that has not said by then what it speaks is closed.
const HANDSHAKE: Duration = Duration::from_secs(10);

pub(super) enum Arrived {
    /// A TCP connection, on which nothing was said yet.
    Socket(TcpStream),
    Link(Box<dyn Link>),
}

// === impl Arrived ===

impl Arrived {
    pub(super) fn closer(&self) -> Option<Closer> {
        match self {
            Arrived::Socket(socket) => {
                let socket = socket.try_clone().ok()?;
                Some(Box::new(move || drop(socket.shutdown(Shutdown::Both))))
            }
            Arrived::Link(link) => link.closer().ok(),
        }
    }

    /// Ready for requests, or closed with a word on why.
    pub(super) fn open(self, shared: &Shared) -> Option<Box<dyn Link>> {
        let socket = match self {
            Arrived::Link(link) => return Some(link),
            Arrived::Socket(socket) => socket,
        };
        let peer = socket.peer_addr().map(|addr| addr.to_string()).unwrap_or_default();
        match shared.door.open(socket, shared.limits.progress.min(HANDSHAKE)) {
            Ok(link) => Some(link),
            // A peer that only looked, or that did not like our certificate and said so.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => None,
            Err(error) => {
                tracing::warn!(peer, %error, "a data stream did not come about");
                None
            }
        }
    }

    /// `open` streams are as many as there may be.
    pub(super) fn refuse(self, door: &Door, open: usize) {
        let link: Option<Box<dyn Link>> = match self {
            Arrived::Link(link) => Some(link),
            Arrived::Socket(socket) if door.is_plain() => tcp::link(socket).ok(),
            Arrived::Socket(_) => None,
        };
        tracing::warn!(open, "refused a data stream: too many are open");
        let Some(mut link) = link else { return };
        let text = format!("{open} streams are open here already");
        link.set_patience(Duration::from_secs(1)).ok();
        link.send(&Message::Fail { code: FailCode::Busy, text }).ok();
    }
}
