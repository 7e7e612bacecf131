//! Messages between several `publish --sender K/N`, as files of a directory that all of them see.

use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anabranch_runtime::Exit;
use anabranch_trainer::Sender;

use crate::failure::Failure;

const POLL: Duration = Duration::from_millis(100);

/// One sender's access to the directory.
pub struct Exchange {
    dir: PathBuf,
    /// Prefix of the names of all files of this version.
    prefix: String,
    sender: Sender,
}

/// The file with this sender's message; removed when dropped.
pub struct Told(PathBuf);

// === impl Exchange ===

impl Exchange {
    /// Access for `sender`, for one version of a job.
    pub fn new(dir: &Path, job: &str, epoch: u32, number: u64, sender: Sender) -> Self {
        // A job's name may be anything; a file's may not.
        let plain = |c: char| if c.is_ascii_alphanumeric() || c == '-' { c } else { '_' };
        let job: String = job.chars().map(plain).collect();
        Self { dir: dir.to_owned(), prefix: format!("{job}.{epoch}.{number}"), sender }
    }

    /// Writes this sender's message, at once or not at all, so that nobody reads half of it.
    pub fn tell(&self, info: &[u8]) -> Result<Told, Failure> {
        let path = self.path(self.sender.index);
        let part = path.with_extension("tmp");
        let failed = |error: io::Error| {
            Failure::new(Exit::Io, format!("cannot write {}: {error}", path.display()))
        };
        std::fs::create_dir_all(&self.dir).map_err(failed)?;
        std::fs::write(&part, info).map_err(failed)?;
        std::fs::rename(&part, &path).map_err(failed)?;
        Ok(Told(path))
    }

    /// Waits for the messages of all senders, and returns them by the senders' numbers.
    pub async fn gather(&self, within: Duration) -> Result<Vec<Vec<u8>>, Failure> {
        let started = Instant::now();
        let mut infos = Vec::new();
        while infos.len() < self.sender.count as usize {
            let path = self.path(infos.len() as u32);
            match tokio::fs::read(&path).await {
                Ok(info) => infos.push(info),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    if started.elapsed() > within {
                        let (k, n) = (infos.len() + 1, self.sender.count);
                        let text = format!("sender {k}/{n} did not write {}", path.display());
                        return Err(Failure::new(Exit::TryAgain, text));
                    }
                    tokio::time::sleep(POLL).await;
                }
                Err(error) => {
                    let text = format!("cannot read {}: {error}", path.display());
                    return Err(Failure::new(Exit::Io, text));
                }
            }
        }
        Ok(infos)
    }

    fn path(&self, index: u32) -> PathBuf {
        let Sender { count, .. } = self.sender;
        self.dir.join(format!("{}.{}of{count}.part", self.prefix, index + 1))
    }
}

impl Drop for Told {
    fn drop(&mut self) {
        // A failure leaves a file that the next try with this number overwrites.
        std::fs::remove_file(&self.0).ok();
    }
}
