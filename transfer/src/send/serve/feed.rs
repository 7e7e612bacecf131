//! A holder that receivers cannot reach dials them instead, says who it is, and is asked on those streams
//! like on any other. Each stream is dialled again while the order stands.

use std::sync::Arc;
use std::time::Duration;

use super::session::{self, StreamEnd};
use super::{Server, Shared};
use anabranch_proto::address::Address;

use crate::link::wire::{Message, PROTO};
use crate::link::{self, Link, LinkError};
use crate::send::listen::ServeError;

/// Failures in a row after which a stream is given up.
const TRIES: u32 = 5;
const FIRST_PAUSE: Duration = Duration::from_millis(100);

/// An order to dial a receiver that cannot dial this source.
#[derive(Clone, Debug)]
pub struct FeedOrder {
    /// The receiver's addresses, best first.
    pub addrs: Vec<Address>,
    /// Grant of role `Feed`, made with the receiver's key, in the name of this source.
    pub grant: Vec<u8>,
    /// Number of streams on which the receiver may ask at once.
    pub streams: usize,
    /// A connection that is not up after so long is given up.
    pub connect: Duration,
}

impl Server {
    /// Sees to it that `order.streams` streams to the receiver are up, on threads that end with this
    /// server, when the receiver closes them, or when it cannot be reached.
    pub fn feed(&self, order: FeedOrder) -> Result<(), ServeError> {
        let order = Arc::new(order);
        let receiver = order.addrs.first().cloned();
        let mut streams = self.shared.lock();
        let up = streams.feeding.get(&receiver).copied().unwrap_or(0);
        for nth in up..order.streams.max(1) {
            let (shared, order) = (Arc::clone(&self.shared), Arc::clone(&order));
            let thread = std::thread::Builder::new()
                .name(format!("transfer-feed-{nth}"))
                .spawn(move || feed_task(&shared, &order))
                .map_err(ServeError::Thread)?;
            streams.threads.push(thread);
            *streams.feeding.entry(receiver.clone()).or_default() += 1;
        }
        Ok(())
    }
}

fn feed_task(shared: &Shared, order: &FeedOrder) {
    feed_while_it_works(shared, order);
    let mut streams = shared.lock();
    if let Some(up) = streams.feeding.get_mut(&order.addrs.first().cloned()) {
        *up -= 1;
    }
}

fn feed_while_it_works(shared: &Shared, order: &FeedOrder) {
    let (mut failures, mut pause) = (0, FIRST_PAUSE);
    while !shared.closing() {
        match feed_once(shared, order) {
            Ok(()) => return,
            Err(StreamEnd::Refused { code, text }) => {
                return tracing::warn!(to = ?order.addrs, ?code, text, "a receiver refused this source");
            }
            Err(StreamEnd::Link(error)) => {
                failures += 1;
                if failures == TRIES {
                    return tracing::warn!(to = ?order.addrs, %error, "cannot reach a receiver from here");
                }
                std::thread::park_timeout(pause);
                pause *= 2;
            }
        }
    }
}

fn feed_once(shared: &Shared, order: &FeedOrder) -> Result<(), StreamEnd> {
    let mut link = dial_any(order)?;
    let id = {
        let mut streams = shared.lock();
        let id = streams.next;
        streams.next += 1;
        streams.open.insert(id, link.closer()?);
        id
    };
    let talked = link
        .send(&Message::Offer { proto: PROTO, grant: order.grant.clone() })
        .map_err(StreamEnd::from)
        .and_then(|()| session::converse(shared, &mut *link, true));
    shared.lock().open.remove(&id);
    match talked {
        Err(StreamEnd::Refused { code, text }) => {
            link.send(&Message::Fail { code, text: text.clone() }).ok();
            Err(StreamEnd::Refused { code, text })
        }
        Err(error) => Err(error),
        Ok(_) => Ok(()),
    }
}

fn dial_any(order: &FeedOrder) -> Result<Box<dyn Link>, LinkError> {
    let mut last = LinkError::NoAddress;
    // Over rdma it is always the one who dialled that reads.
    for addr in order.addrs.iter().filter(|addr| !matches!(addr, Address::Rdma(_))) {
        match link::dial(addr, order.connect) {
            Ok(link) => return Ok(link),
            Err(error) => last = error,
        }
    }
    Err(last)
}
