//! Publishing as one of several senders that each have a part of a version: a rank of a sharded trainer, a
//! node, a NIC. The parts meet in what the senders tell each other, over a collective of the trainer's own.
//!
//! ```text
//!   job.publish_part(number, layout, mine) ─► Part::info ══ all_gather of bytes ══► Part::seal(infos) ─► Published
//! ```

use std::future::Future;
use std::time::Duration;

use anabranch_transfer::{PartInfo, PieceRef, PublishingPart, Sender};
use bytes::Bytes;
use tokio::task::spawn_blocking;

use crate::error::Error;
use crate::job::Job;
use crate::publish::{Published, failed};

/// Bytes of a tensor that this sender has: all of them, or a run of them (a shard along dimension 0).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedPiece {
    pub tensor: String,
    /// From the start of the tensor, in bytes.
    pub offset: u64,
    pub data: Bytes,
}

/// A part whose snapshot was taken, and that nobody knows of yet. Nothing else can be published here until
/// it is sealed or dropped.
pub struct Part {
    pub number: u64,
    /// Of the whole version.
    pub image_bytes: u64,
    /// Of this part.
    pub bytes: u64,
    /// How long the trainer was kept.
    pub copied_in: Duration,
    job: Job,
    part: anabranch_transfer::Part,
    info: Vec<u8>,
}

// === impl Part ===

impl Part {
    pub(crate) async fn new(
        job: &Job,
        number: u64,
        publishing: impl Future<Output = Result<PublishingPart, Error>>,
    ) -> Result<Self, Error> {
        Self::sender(job, number)?;
        let publishing = publishing.await?;
        let PublishingPart { image_bytes, bytes, copied_in, .. } = publishing;
        let part = publishing.hashed().await.map_err(|error| failed(number, error))?;
        let info = part.info().encode();
        Ok(Self { number, image_bytes, bytes, copied_in, job: job.clone(), part, info })
    }

    /// Which one this process is.
    pub(crate) fn sender(job: &Job, number: u64) -> Result<Sender, Error> {
        let why = "open the job with `weights.sender`: which sender this is, of how many";
        job.config().weights.sender.ok_or_else(|| failed(number, why))
    }

    /// What every other sender must get of this one: hashes, and a chunk or two for each run of tensors.
    pub fn info(&self) -> &[u8] {
        &self.info
    }

    /// With the infos of all senders, this one's too, ordered by their number. The manager offers the version
    /// once all senders have sealed it.
    pub async fn seal<I: AsRef<[u8]>>(self, infos: &[I]) -> Result<Published, Error> {
        let Self { number, image_bytes, copied_in, job, part, .. } = self;
        let count = Self::sender(&job, number)?.count as usize;
        if infos.len() != count {
            let why = format!("{} infos given, there are {count} senders", infos.len());
            return Err(failed(number, why));
        }
        let mut parts = Vec::with_capacity(infos.len());
        for (sender, info) in infos.iter().enumerate() {
            let decoded = PartInfo::decode(info.as_ref());
            let why = |error| failed(number, format!("what sender {} told: {error}", sender + 1));
            parts.push(decoded.map_err(why)?);
        }
        let sealed = spawn_blocking(move || part.seal(&parts)).await;
        let sealed = sealed.map_err(|error| failed(number, error))?;
        let version = sealed.map_err(|error| failed(number, error))?.version;
        job.publications().publish_sealed(&job, version, image_bytes, copied_in).await
    }
}

impl NamedPiece {
    pub(crate) fn borrow(&self) -> PieceRef<'_> {
        PieceRef { tensor: &self.tensor, offset: self.offset, data: &self.data }
    }
}
