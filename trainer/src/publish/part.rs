//! Publishing as one of several senders that each have a part of a version: a rank of a sharded trainer, a
//! node, a network card. The senders tell each other what is in their parts over a collective of the
//! trainer's own.
//!
//! ```text
//!   job.publish_part(number, layout, mine) ─► Part::info ══ all_gather of bytes ══► Part::seal(infos) ─► Published
//! ```

use std::sync::Arc;
use std::time::Duration;

use anabranch_transfer::{PartInfo, PublishingPart, Sender};
use tokio::task::spawn_blocking;

use super::publications::Publications;
use super::published::{Published, failed};
use crate::error::Error;
use crate::session::Session;

/// This sender's part of a version: its snapshot was taken, and nobody knows of it yet. Nothing else can be
/// published here until it is sealed or dropped.
pub struct Part {
    /// Number of the version.
    pub number: u64,
    /// Size of the whole version.
    pub image_bytes: u64,
    /// Size of this part.
    pub bytes: u64,
    /// Time that the trainer was kept: the copy.
    pub copied_in: Duration,
    session: Session,
    publications: Arc<Publications>,
    part: anabranch_transfer::Part,
    info: Vec<u8>,
}

// === impl Part ===

impl Part {
    /// Hashes a part that is in the arena.
    pub(crate) async fn new(
        session: &Session,
        publications: &Arc<Publications>,
        publishing: PublishingPart,
    ) -> Result<Self, Error> {
        let PublishingPart { number, image_bytes, bytes, copied_in, .. } = publishing;
        let part = publishing.hashed().await.map_err(|error| failed(number, error))?;
        let info = part.info().encode();
        let (session, publications) = (session.clone(), publications.clone());
        Ok(Self { number, image_bytes, bytes, copied_in, session, publications, part, info })
    }

    /// Number of this process among the senders; an error if the job was opened without one.
    pub(crate) fn sender(session: &Session, number: u64) -> Result<Sender, Error> {
        let why = "open the job with `weights.sender`: which sender this is, of how many";
        session.config().weights.sender.ok_or_else(|| failed(number, why))
    }

    /// Message for every other sender: the part's hashes, and a chunk or two for each run of tensors.
    pub fn info(&self) -> &[u8] {
        &self.info
    }

    /// Seals the version with the infos of all senders, this one's included, ordered by their number. The
    /// manager offers the version once all senders have sealed it.
    pub async fn seal<I: AsRef<[u8]>>(self, infos: &[I]) -> Result<Published, Error> {
        let number = self.number;
        let count = Self::sender(&self.session, number)?.count as usize;
        let parts = decode(infos, count).map_err(|why| failed(number, why))?;
        let Self { part, session, publications, image_bytes, copied_in, .. } = self;
        let sealed = spawn_blocking(move || part.seal(&parts)).await;
        let sealed = sealed.map_err(|error| failed(number, error))?;
        let version = sealed.map_err(|error| failed(number, error))?.version;
        publications.publish_sealed(&session, version, (image_bytes, copied_in)).await
    }
}

fn decode<I: AsRef<[u8]>>(infos: &[I], count: usize) -> Result<Vec<PartInfo>, String> {
    if infos.len() != count {
        return Err(format!("{} infos given, there are {count} senders", infos.len()));
    }
    let decode = |(sender, info): (usize, &I)| {
        let decoded = PartInfo::decode(info.as_ref());
        decoded.map_err(|error| format!("what sender {} told: {error}", sender + 1))
    };
    infos.iter().enumerate().map(decode).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn infos_of_the_wrong_number_or_form_are_refused_by_sender() {
        let why = decode(&[[0u8; 3]], 2).expect_err("one is missing");
        assert_eq!(why, "1 infos given, there are 2 senders");
        let why = decode(&[[0u8; 3]], 1).expect_err("no info has three bytes");
        assert!(why.starts_with("what sender 1 told: "), "{why}");
    }

    #[tokio::test]
    async fn a_job_without_a_sender_publishes_no_parts() {
        let error = Part::sender(&Session::offline(), 4).expect_err("it publishes alone");
        assert!(error.to_string().starts_with("version 4: open the job with"), "{error}");
    }
}
