//! Publishing: how a version comes. Announced and sealed by its trainer, or by several senders of the version
//! that each have all of it or a part.
//!
//! ```text
//!   sender:   (none) ── announce ──► Announced ── seal{root} ──► Sealed ── lost ──► absent ── announce ──► Sealed
//!                                       └── lost ──► (none)
//!   version:  available once as many senders as were said have sealed, all with one root
//! ```

use anabranch_proto::Version;
use anabranch_runtime::clock::Now;

use super::Weights;
use super::change::Change;
use super::versions::{Sender, VersionRecord, VersionState};
use crate::action::Notice;
use crate::event::{Announce, PublisherId, SenderOf};
use crate::outbox::Outbox;

/// A publisher that says nothing has all, alone.
const ALONE: SenderOf = SenderOf { index: 0, count: 1, part: false };

/// Addresses of exported versions begin so: they need no trainer.
const EXPORTED: &str = "file:";

impl Weights {
    /// A sender names a version that it will seal. `Err` says why it may not.
    pub fn announce(
        &mut self,
        publisher: PublisherId,
        version: Version,
        announce: Announce,
        serve_key: [u8; 32],
        out: &mut Outbox,
    ) -> Result<(), String> {
        let refused = match self.books.get(version.number) {
            Some(record) => self.published_elsewhere(record, publisher, &announce),
            None => self.books.check(version).err().map(|why| why.to_string()),
        };
        if let Some(why) = refused {
            return Err(why);
        }
        if announce.addresses.is_empty() && !announce.dials && announce.directory.is_none() {
            return Err("nothing to fetch from: give data-plane addresses, a trainer that dials, or a directory \
                        every engine host can read"
                .to_owned());
        }
        if self.books.get(version.number).is_none() {
            let bytes = announce.bytes;
            let of = announce.sender.unwrap_or(ALONE).count;
            self.commit(Change::Announced { version, of, bytes });
            out.tell(Notice::VersionAnnounced { version, bytes });
        }
        self.add_sender(publisher, announce, serve_key);
        self.news(true);
        Ok(())
    }

    /// A new sender, or one whose link broke and that is back with a version that is known: it serves again.
    fn add_sender(&mut self, publisher: PublisherId, announce: Announce, serve_key: [u8; 32]) {
        let number = announce.version.number;
        let SenderOf { index, count, part } = announce.sender.unwrap_or(ALONE);
        let Some(record) = self.books.get(number) else { return };
        // Nobody serves it any more (`published_elsewhere`): these do from now on.
        let others = record.of() != count;
        if others || record.directory() != announce.directory.as_ref() {
            let directory = announce.directory;
            self.commit(Change::Described { number, of: count, directory });
        }
        let Some(live) = self.books.live_mut(number) else { return };
        if others {
            live.senders.clear();
        }
        let root = live.senders.get(&index).and_then(|before| before.root);
        let (addresses, dials, session) = (announce.addresses, announce.dials, announce.session);
        let publisher = Some(publisher);
        let sender = Sender { publisher, addresses, dials, part, session, serve_key, root };
        live.senders.insert(index, sender);
    }

    /// Why another publisher is at it with the same number, and this one is not of its senders.
    fn published_elsewhere(
        &self,
        record: &VersionRecord,
        publisher: PublisherId,
        announce: &Announce,
    ) -> Option<String> {
        let SenderOf { index, count, .. } = announce.sender.unwrap_or(ALONE);
        let known = record.live().senders.get(&index);
        let joins =
            count == record.of() && known.is_none_or(|known| is_back(record, known, announce));
        if joins || !record.is_served() {
            return None;
        }
        let (at, before) = known.map(|known| (index, known)).or_else(|| {
            let (at, before) = record.live().senders.iter().next()?;
            Some((*at, before))
        })?;
        let stream = before.publisher.map_or(0, |other| other.0);
        let version = record.version();
        if before.publisher == Some(publisher) {
            return Some(format!("{version} is announced on this stream already"));
        }
        Some(format!(
            "{version} is published by another trainer already ({}stream {stream}, session {}, at {}); this one is \
             {}at {} (session {}). Are there two trainers with the same job? Stop one, or open the job with a \
             higher epoch. Senders that publish one version together must each say which of how many it is",
            which(at, record.of()),
            before.session.0,
            named(&before.addresses),
            which(index, count),
            named(&announce.addresses),
            announce.session.0
        ))
    }

    /// A sender has written all it has. `Err` says why the seal does not hold.
    pub fn seal(
        &mut self,
        now: Now,
        publisher: PublisherId,
        version: Version,
        out: &mut Outbox,
    ) -> Result<(), String> {
        let number = version.number;
        let record = self.books.get(number);
        let Some((record, index)) = record.and_then(|r| Some((r, r.sender_of(publisher)?))) else {
            return Err("seal without an announced version on this stream".to_owned());
        };
        if let Some(why) = other_root(record, index, version) {
            return Err(why);
        }
        if let Some(sender) = self.books.live_mut(number).and_then(|l| l.senders.get_mut(&index)) {
            sender.root = Some(version.root);
        }
        let complete = self
            .books
            .get(number)
            .is_some_and(|record| record.state() == VersionState::Announced && record.is_sealed());
        if complete {
            self.commit(Change::Sealed { number, root: version.root });
            if let Some(live) = self.books.live_mut(number) {
                live.sealed = Some(now);
            }
            if let Some(record) = self.books.get(number) {
                out.tell(Notice::VersionAvailable { version: record.version() });
            }
        }
        // A sender that is back hears how the version stands.
        self.has_news(now, version, out);
        self.news(true);
        Ok(())
    }

    /// A publisher's stream is lost: it serves its versions no more. Peers that have them still do, and what
    /// lies in files is read without the publisher.
    pub fn lose_publisher(&mut self, publisher: PublisherId) {
        let of_it = |record: &VersionRecord| {
            let index = record.sender_of(publisher)?;
            Some((record.version().number, index, record.state() == VersionState::Announced))
        };
        let lost: Vec<(u64, u32, bool)> = self.books.iter().filter_map(of_it).collect();
        for (number, index, announced) in lost {
            let Some(live) = self.books.live_mut(number) else { continue };
            if let Some(sender) = live.senders.get_mut(&index) {
                sender.publisher = None;
                sender.dials = false;
                sender.addresses.retain(|addr| addr.starts_with(EXPORTED));
            }
            if announced {
                live.senders.remove(&index);
            }
            if live.senders.is_empty() {
                self.commit(Change::Removed { number });
            }
        }
        self.news(true);
    }
}

/// True where a sender is back whose old stream may not be known to be lost yet: the same addresses are the same sender,
/// and so is one without a listener in the same session of the trainer.
fn is_back(record: &VersionRecord, known: &Sender, announce: &Announce) -> bool {
    let in_place =
        announce.directory.is_some() && record.directory() == announce.directory.as_ref();
    let same = known.addresses == announce.addresses && !announce.addresses.is_empty();
    let dials_again = known.dials && announce.dials && known.session == announce.session;
    known.publisher.is_none() || in_place || same || dials_again
}

/// Why this root is not that of the version, if another sender sealed it.
fn other_root(record: &VersionRecord, index: u32, version: Version) -> Option<String> {
    let other = |(at, sender): (&u32, &Sender)| {
        let root = sender.root.filter(|root| *root != version.root)?;
        let addresses = named(&sender.addresses);
        Some(format!(
            "{} has root {} by {}the sender at {addresses}, root {} by {}this one: they have not published the \
             same bytes (parts of one version are sealed with what all senders told)",
            record.version(),
            root,
            which(*at, record.of()),
            version.root,
            which(index, record.of()),
        ))
    };
    let sealed = || {
        let ours = record.version().root;
        let differs = record.state() != VersionState::Announced && ours != version.root;
        differs.then(|| {
            format!("{} is known with root {ours}, not {}", record.version(), version.root)
        })
    };
    record.live().senders.iter().find_map(other).or_else(sealed)
}

fn which(index: u32, count: u32) -> String {
    if count > 1 { format!("sender {} of {count}, ", index + 1) } else { String::new() }
}

fn named(addresses: &[String]) -> String {
    if addresses.is_empty() { "no address".to_owned() } else { addresses.join(", ") }
}
