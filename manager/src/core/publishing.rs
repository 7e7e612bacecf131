//! How a version comes: announced and sealed by its trainer, or by several senders of it that each have all
//! of it or a part.
//!
//! ```text
//!   sender:   (none) ── announce ──► Announced ── seal{root} ──► Sealed ── lost ──► absent ── announce ──► Sealed
//!                                       └── lost ──► (none)
//!   version:  available once as many senders as were said have sealed, all with one root
//! ```

use std::collections::BTreeMap;

use anabranch_proto::Version;
use anabranch_runtime::clock::Now;

use super::Core;
use crate::action::{Answer, FailKind, Notice};
use crate::event::{Announce, PublisherId, ReplyTo, SenderOf};
use crate::weights::versions::{Sender, VersionRecord, VersionState};

/// A publisher that says nothing has all, alone.
const ALONE: SenderOf = SenderOf { index: 0, count: 1, part: false };

impl Core {
    pub(super) fn announce(
        &mut self,
        now: Now,
        publisher: PublisherId,
        announce: Announce,
        reply: ReplyTo,
    ) {
        let epoch = match self.job_of(announce.session) {
            Ok(job) => job.epoch,
            Err((kind, why)) => return self.fail(reply, kind, why),
        };
        self.trainer_heard(now);
        let version = Version { epoch, ..announce.version };
        let refused = match self.versions.get(version.number) {
            Some(record) => self.published_elsewhere(record, publisher, &announce),
            None => self.versions.check(version).err().map(|why| why.to_string()),
        };
        if let Some(why) = refused {
            return self.fail(reply, FailKind::BadRequest, why);
        }
        if announce.addresses.is_empty() && !announce.dials && announce.directory.is_none() {
            let why = "nothing to fetch from: give data-plane addresses, a trainer that dials, or a directory every engine host can read";
            return self.fail(reply, FailKind::BadRequest, why);
        }
        if self.versions.get(version.number).is_none() {
            let bytes = announce.bytes;
            self.versions.insert(VersionRecord {
                version,
                state: VersionState::Announced,
                of: announce.sender.unwrap_or(ALONE).count,
                senders: BTreeMap::new(),
                directory: None,
                bytes,
                sealed: None,
                settled: false,
                engines: BTreeMap::new(),
            });
            self.tell(Notice::VersionAnnounced { version, bytes });
        }
        self.add_sender(publisher, announce);
        self.reply(reply, Answer::Done);
    }

    /// A new one, or one whose link broke and that is back with a version that we know: it serves it again.
    fn add_sender(&mut self, publisher: PublisherId, announce: Announce) {
        let serve_key = self.config.serve_key("trainer", announce.session.0);
        let Some(record) = self.versions.get_mut(announce.version.number) else { return };
        let SenderOf { index, count, part } = announce.sender.unwrap_or(ALONE);
        record.directory = announce.directory;
        if record.of != count {
            // Nobody serves it any more (`published_elsewhere`): these do from now on.
            record.of = count;
            record.senders.clear();
        }
        let root = record.senders.get(&index).and_then(|before| before.root);
        let (addresses, dials, session) = (announce.addresses, announce.dials, announce.session);
        let publisher = Some(publisher);
        let sender = Sender { publisher, addresses, dials, part, session, serve_key, root };
        record.senders.insert(index, sender);
    }

    /// Why another publisher is at it with the same number, and this one is not of its senders.
    fn published_elsewhere(
        &self,
        record: &VersionRecord,
        publisher: PublisherId,
        announce: &Announce,
    ) -> Option<String> {
        let SenderOf { index, count, .. } = announce.sender.unwrap_or(ALONE);
        let known = record.senders.get(&index);
        let joins =
            count == record.of && known.is_none_or(|known| is_back(record, known, announce));
        if joins || !record.is_served() {
            return None;
        }
        let (at, before) = known.map(|known| (index, known)).or_else(|| {
            let (at, before) = record.senders.iter().next()?;
            Some((*at, before))
        })?;
        let stream = before.publisher.map_or(0, |other| other.0);
        let version = record.version;
        if before.publisher == Some(publisher) {
            return Some(format!("{version} is announced on this stream already"));
        }
        Some(format!(
            "{version} is published by another trainer already ({}stream {stream}, session {}, at {}); this one is \
             {}at {} (session {}). Are there two trainers with the same job? Stop one, or open the job with a \
             higher epoch. Senders that publish one version together must each say which of how many it is",
            which(at, record.of),
            before.session.0,
            named(&before.addresses),
            which(index, count),
            named(&announce.addresses),
            announce.session.0
        ))
    }

    pub(super) fn seal(
        &mut self,
        now: Now,
        publisher: PublisherId,
        version: Version,
        reply: ReplyTo,
    ) {
        let Some(record) = self.versions.of_publisher(publisher, version.number) else {
            let why = "seal without an announced version on this stream";
            return self.fail(reply, FailKind::BadRequest, why);
        };
        let Some((index, _)) = record.sender_of(publisher) else { return };
        if let Some(why) = other_root(record, index, version) {
            return self.fail(reply, FailKind::BadRequest, why);
        }
        if let Some(sender) = record.senders.get_mut(&index) {
            sender.root = Some(version.root);
        }
        if record.state == VersionState::Announced && record.is_sealed() {
            record.version.root = version.root;
            record.state = VersionState::Available;
            record.sealed = Some(now);
            let version = record.version;
            self.tell(Notice::VersionAvailable { version });
        }
        self.reply(reply, Answer::Done);
    }

    /// It does not serve its versions any more. Peers that have them still do, and what lies in files is
    /// read without it.
    pub(super) fn lose_publisher(&mut self, _now: Now, publisher: PublisherId) {
        let mut gone = Vec::new();
        for record in self.versions.iter_mut() {
            let announced = record.state == VersionState::Announced;
            let Some((index, sender)) = record.sender_of(publisher) else { continue };
            sender.publisher = None;
            sender.dials = false;
            sender.addresses.retain(|addr| addr.starts_with(EXPORTED));
            if announced {
                record.senders.remove(&index);
            }
            if record.senders.is_empty() {
                gone.push(record.version.number);
            }
        }
        gone.into_iter().for_each(|number| self.versions.remove(number));
    }
}

/// Its old stream may not be known to be lost yet: the same addresses are the same sender.
fn is_back(record: &VersionRecord, known: &Sender, announce: &Announce) -> bool {
    let in_place = announce.directory.is_some() && record.directory == announce.directory;
    let same = known.addresses == announce.addresses && !announce.addresses.is_empty();
    known.publisher.is_none() || in_place || same
}

/// Why this root is not that of the version, if another sender sealed it.
fn other_root(record: &VersionRecord, index: u32, version: Version) -> Option<String> {
    let other = |(at, sender): (&u32, &Sender)| {
        let root = sender.root.filter(|root| *root != version.root)?;
        let addresses = named(&sender.addresses);
        Some(format!(
            "{} has root {} by {}the sender at {addresses}, root {} by {}this one: they have not published the \
             same bytes (parts of one version are sealed with what all senders told)",
            record.version,
            root,
            which(*at, record.of),
            version.root,
            which(index, record.of),
        ))
    };
    let sealed = || {
        let ours = record.version.root;
        let differs = record.state != VersionState::Announced && ours != version.root;
        differs
            .then(|| format!("{} is known with root {ours}, not {}", record.version, version.root))
    };
    record.senders.iter().find_map(other).or_else(sealed)
}

fn which(index: u32, count: u32) -> String {
    if count > 1 { format!("sender {} of {count}, ", index + 1) } else { String::new() }
}

fn named(addresses: &[String]) -> String {
    if addresses.is_empty() { "no address".to_owned() } else { addresses.join(", ") }
}

/// Addresses of exported versions, which need no trainer.
const EXPORTED: &str = "file:";
