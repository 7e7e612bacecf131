//! Streams that are kept between versions, and the greeting that binds one to a version.

use std::collections::BTreeMap;
use std::sync::Mutex;

use anabranch_proto::version::Root;

use super::{Shared, SourceRef, StreamError};
use crate::link::tcp::TcpLink;
use crate::wire::{Message, PROTO};

/// Idle streams per address; more than this are closed.
const KEPT: usize = 16;

/// Idle streams by the address they go to.
#[derive(Default)]
pub(super) struct Pool {
    idle: Mutex<BTreeMap<String, Vec<TcpLink>>>,
}

/// A stream bound to the version that its grant names.
pub(super) struct Session {
    pub(super) link: TcpLink,
    pub(super) complete: bool,
    pub(super) delta_bytes: u64,
}

// === impl Pool ===

impl Pool {
    pub(super) fn put(&self, addr: &str, link: TcpLink) {
        let mut idle = self.idle.lock().expect("held only to push and pop");
        let links = idle.entry(addr.to_owned()).or_default();
        if links.len() < KEPT {
            links.push(link);
        }
    }

    fn take(&self, addr: &str) -> Option<TcpLink> {
        let mut idle = self.idle.lock().expect("held only to push and pop");
        let links = idle.get_mut(addr)?;
        while let Some(link) = links.pop() {
            if link.is_idle() {
                return Some(link);
            }
        }
        idle.remove(addr);
        None
    }
}

// === impl Session ===

impl Session {
    /// On a kept stream if one lives, else on a new one.
    pub(super) fn open(
        shared: &Shared,
        source: &SourceRef,
        base: Root,
    ) -> Result<Session, StreamError> {
        if let Some(link) = shared.pool.take(&source.addr) {
            match greet(shared, link, source, base) {
                // The peer may have closed it a moment ago: only a new stream tells.
                Err(StreamError::Link(_)) => {}
                other => return other,
            }
        }
        let link = TcpLink::connect(&source.addr, shared.rules.connect)?;
        greet(shared, link, source, base)
    }
}

fn greet(
    shared: &Shared,
    mut link: TcpLink,
    source: &SourceRef,
    base: Root,
) -> Result<Session, StreamError> {
    link.set_patience(shared.rules.progress)?;
    link.send(&Message::Hi { proto: PROTO, base, grant: source.grant.clone() })?;
    match link.receive()? {
        Message::Welcome { complete, delta_bytes } => Ok(Session { link, complete, delta_bytes }),
        other => Err(StreamError::from_reply(other)),
    }
}
