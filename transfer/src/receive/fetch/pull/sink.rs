//! Destination of verified chunks: a staging slot, or plain memory (a delta).

use std::sync::Arc;

use crate::image::chunks::Ledger;
use crate::memory::map::SharedMap;
use crate::receive::staging::Filler;

pub(in crate::receive::fetch) enum Sink {
    Slot(Filler),
    Memory { map: Arc<SharedMap>, ledger: Arc<Ledger> },
}

impl Sink {
    pub(super) fn map(&self) -> &SharedMap {
        match self {
            Sink::Slot(filler) => filler.map(),
            Sink::Memory { map, .. } => map,
        }
    }

    pub(super) fn ledger(&self) -> &Ledger {
        match self {
            Sink::Slot(filler) => &filler.ledger,
            Sink::Memory { ledger, .. } => ledger,
        }
    }

    pub(super) fn verified(&self, index: u32) -> std::io::Result<()> {
        match self {
            Sink::Slot(filler) => filler.verified(index),
            Sink::Memory { ledger, .. } => {
                ledger.insert(index);
                Ok(())
            }
        }
    }
}
