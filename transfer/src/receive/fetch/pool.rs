//! Streams that are kept between versions, and the greeting that binds one to a version.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;

use anabranch_proto::address::Address;
use anabranch_proto::version::Root;

use super::{Shared, SourceRef, StreamError};
use crate::link::wire::{Message, PROTO};
use crate::link::{self, Link, LinkError};

/// Idle streams per address; more than this are closed.
const KEPT: usize = 16;

/// Idle streams by the address they go to.
#[derive(Default)]
pub(super) struct Pool {
    idle: Mutex<BTreeMap<Address, Vec<Box<dyn Link>>>>,
    /// Addresses that did not answer when they were last tried: tried last.
    silent: Mutex<BTreeSet<Address>>,
}

/// A stream bound to the version that its grant names.
pub(super) struct SourceStream {
    pub(super) link: Box<dyn Link>,
    /// The one of the source's addresses that it goes to.
    pub(super) addr: Address,
    pub(super) complete: bool,
    pub(super) delta_complete: bool,
    pub(super) delta_bytes: u64,
}

// === impl Pool ===

impl Pool {
    fn put(&self, addr: &Address, link: Box<dyn Link>) {
        let mut idle = self.idle.lock().expect("held only to push and pop");
        let links = idle.entry(addr.clone()).or_default();
        if links.len() < KEPT {
            links.push(link);
        }
    }

    fn take(&self, addr: &Address) -> Option<Box<dyn Link>> {
        let mut idle = self.idle.lock().expect("held only to push and pop");
        let links = idle.get_mut(addr)?;
        while let Some(mut link) = links.pop() {
            if link.is_idle() {
                return Some(link);
            }
        }
        idle.remove(addr);
        None
    }

    /// The given order, but those that were silent come last.
    fn in_order<'a>(&self, addrs: &'a [Address]) -> Vec<&'a Address> {
        let silent = self.silent.lock().expect("held only to look and note");
        let mut ordered: Vec<&Address> = addrs.iter().collect();
        ordered.sort_by_key(|addr| silent.contains(*addr));
        ordered
    }

    fn note(&self, addr: &Address, answered: bool) {
        let mut silent = self.silent.lock().expect("held only to look and note");
        if answered {
            silent.remove(addr);
        } else {
            silent.insert(addr.clone());
        }
    }
}

// === impl SourceStream ===

impl SourceStream {
    /// Binds a kept stream if one lives, else a new one to the first address that answers.
    pub(super) fn open(
        shared: &Shared,
        source: &SourceRef,
        base: Root,
    ) -> Result<SourceStream, StreamError> {
        let mut first = None;
        for addr in shared.pool.in_order(&source.addrs) {
            let opened = SourceStream::open_at(shared, addr, &source.grant, base);
            shared.pool.note(addr, !matches!(opened, Err(StreamError::Link(_))));
            match opened {
                Err(StreamError::Link(error)) => first = first.or(Some(error)),
                other => return other,
            }
        }
        Err(first.unwrap_or(LinkError::NoAddress).into())
    }

    fn open_at(
        shared: &Shared,
        addr: &Address,
        grant: &[u8],
        base: Root,
    ) -> Result<SourceStream, StreamError> {
        if let Some(link) = shared.pool.take(addr) {
            match greet(shared, link, addr, grant, base) {
                // The peer may have closed it a moment ago: only a new stream tells.
                Err(StreamError::Link(_)) => {}
                other => return other,
            }
        }
        let within = shared.rules.connect;
        let dialled = match addr {
            Address::Feed(source) => shared.holder.inbound().take(source, within),
            _ => None,
        };
        let link = dialled.map_or_else(|| link::dial(addr, within), Ok)?;
        greet(shared, link, addr, grant, base)
    }

    /// Kept for the next use.
    pub(super) fn keep(self, shared: &Shared) {
        shared.pool.put(&self.addr, self.link);
    }
}

fn greet(
    shared: &Shared,
    mut link: Box<dyn Link>,
    addr: &Address,
    grant: &[u8],
    base: Root,
) -> Result<SourceStream, StreamError> {
    link.set_patience(shared.rules.progress)?;
    link.send(&Message::Hi { proto: PROTO, base, grant: grant.to_vec() })?;
    match link.receive()? {
        Message::Welcome { complete, delta_complete, delta_bytes } => {
            Ok(SourceStream { link, addr: addr.clone(), complete, delta_complete, delta_bytes })
        }
        other => Err(StreamError::from_reply(other)),
    }
}
