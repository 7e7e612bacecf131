//! The versions that a job publishes from this process: the publisher that serves them, and one announcing
//! task for each.

use std::collections::VecDeque;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anabranch_proto::{Invalid, Version};
use anabranch_transfer::{
    PieceRef, PublishError, Publisher, PublisherConfig, Publishing, PublishingPart, Sender,
    ShmArena, TensorRef,
};
use tokio::runtime::{Handle, RuntimeFlavor};
use tokio::sync::{Mutex, watch};
use tokio::task::{JoinSet, spawn_blocking};

use super::announce::{Announcement, Offer, Source};
use super::published::{Progress, Published, failed};
use crate::config::{Shm, WeightServer};
use crate::error::Error;
use crate::session::Session;

/// Announced versions that are followed: as many as the arena keeps.
const KEPT: usize = 2;

/// All versions that this process published for a job and still serves. Dropping them stops the server.
#[derive(Default)]
pub(crate) struct Publications {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    publisher: Option<Arc<Publisher>>,
    /// One announcing task per version, the oldest first; at most [`KEPT`].
    announced: VecDeque<JoinSet<()>>,
}

// === impl Publications ===

impl Publications {
    /// Copies the tensors, then announces the version.
    pub(crate) async fn publish(
        &self,
        session: &Session,
        number: u64,
        tensors: &[TensorRef<'_>],
    ) -> Result<Published, Error> {
        check_number(number)?;
        let mut state = self.state.lock().await;
        let publisher = state.make_room(session).await?;
        let publishing = in_place(|| publisher.publish(number, tensors));
        let publishing = publishing.map_err(|error| failed(number, error))?;
        Ok(state.announce(session, publisher, publishing))
    }

    /// Reads a checkpoint, then announces the version.
    pub(crate) async fn publish_directory(
        &self,
        session: &Session,
        number: u64,
        path: PathBuf,
    ) -> Result<Published, Error> {
        check_number(number)?;
        let mut state = self.state.lock().await;
        let publisher = state.make_room(session).await?;
        let writer = publisher.clone();
        let publishing =
            on_a_thread(number, move || writer.publish_directory(number, &path)).await?;
        Ok(state.announce(session, publisher, publishing))
    }

    /// Copies a part; nobody is told of it before it is sealed.
    pub(crate) async fn publish_part(
        &self,
        session: &Session,
        number: u64,
        layout: &[anabranch_transfer::layout::TensorSpec],
        pieces: &[PieceRef<'_>],
    ) -> Result<PublishingPart, Error> {
        check_number(number)?;
        let mut state = self.state.lock().await;
        let publisher = state.make_room(session).await?;
        let part = in_place(|| publisher.publish_part(number, layout, pieces));
        part.map_err(|error| failed(number, error))
    }

    /// Reads this sender's part of a checkpoint; nobody is told of it before it is sealed.
    pub(crate) async fn publish_directory_part(
        &self,
        session: &Session,
        number: u64,
        (path, sender): (PathBuf, Sender),
    ) -> Result<PublishingPart, Error> {
        check_number(number)?;
        let mut state = self.state.lock().await;
        let publisher = state.make_room(session).await?;
        on_a_thread(number, move || publisher.publish_directory_part(number, &path, sender)).await
    }

    /// Announces a version whose part this process lends from now on.
    pub(crate) async fn publish_sealed(
        &self,
        session: &Session,
        version: Version,
        (bytes, copied_in): (u64, Duration),
    ) -> Result<Published, Error> {
        let mut state = self.state.lock().await;
        let source = Source::Publisher(state.publisher(session).await?);
        let sealing = Box::pin(std::future::ready(Ok(version)));
        let offer = Offer { number: version.number, bytes, source, part: true, sealing };
        Ok(state.follow(session, offer, copied_in))
    }

    /// Announces a checkpoint that engines read where it lies: nothing is copied or served.
    pub(crate) async fn publish_in_place(
        &self,
        session: &Session,
        number: u64,
        path: &Path,
    ) -> Result<Published, Error> {
        check_number(number)?;
        let started = Instant::now();
        let (threads, epoch) = (session.config().weights.hash_threads, session.config().epoch);
        let offer = Offer::in_place(number, epoch, path, threads.max(1)).await?;
        Ok(self.state.lock().await.follow(session, offer, started.elapsed()))
    }

    /// Stops serving.
    pub(crate) async fn close(&self) {
        *self.state.lock().await = State::default();
    }
}

/// Runs `work`, which blocks, on this thread: what it borrows cannot move to another one. A multi-threaded
/// runtime moves the thread's other tasks away for that time; on a single thread they wait.
fn in_place<T>(work: impl FnOnce() -> T) -> T {
    match Handle::current().runtime_flavor() {
        RuntimeFlavor::MultiThread => tokio::task::block_in_place(work),
        _ => work(),
    }
}

async fn on_a_thread<T: Send + 'static>(
    number: u64,
    work: impl FnOnce() -> Result<T, PublishError> + Send + 'static,
) -> Result<T, Error> {
    let done = spawn_blocking(work).await.map_err(|error| failed(number, error))?;
    done.map_err(|error| failed(number, error))
}

fn check_number(number: u64) -> Result<(), Error> {
    match number {
        0 => Err(failed(number, "number 0 means the engines' start-up weights; count from 1")),
        _ => Ok(()),
    }
}

// === impl State ===

impl State {
    /// The publisher, with room in its arena for one more version: the oldest can no longer be fetched
    /// here.
    async fn make_room(&mut self, session: &Session) -> Result<Arc<Publisher>, Error> {
        let publisher = self.publisher(session).await?;
        self.announced.drain(..self.announced.len().saturating_sub(KEPT - 1));
        Ok(publisher)
    }

    /// Starts the publisher at the first publication: a trainer that publishes nothing listens nowhere.
    async fn publisher(&mut self, session: &Session) -> Result<Arc<Publisher>, Error> {
        let key = session.opened().await.serve_key;
        let publisher = match &self.publisher {
            Some(publisher) => publisher.clone(),
            None => {
                let publisher = Publisher::start(publisher_config(session)?);
                self.publisher.insert(Arc::new(publisher.map_err(|e| failed(0, e))?)).clone()
            }
        };
        publisher.set_serve_key(key);
        Ok(publisher)
    }

    fn announce(
        &mut self,
        session: &Session,
        publisher: Arc<Publisher>,
        publishing: Publishing,
    ) -> Published {
        let (number, bytes, copied_in) =
            (publishing.number, publishing.bytes, publishing.copied_in);
        let sealing = Box::pin(async {
            let sealed = publishing.sealed().await;
            sealed.map(|p| p.version).map_err(|error| error.to_string())
        });
        let source = Source::Publisher(publisher);
        self.follow(session, Offer { number, bytes, source, part: false, sealing }, copied_in)
    }

    /// Tells the manager, and goes on telling it until newer versions take the place.
    fn follow(&mut self, session: &Session, offer: Offer, copied_in: Duration) -> Published {
        let (progress, seen) = watch::channel(Progress::Hashing);
        let (number, bytes) = (offer.number, offer.bytes);
        let announcement = Announcement::new(session, offer, progress);
        let mut task = JoinSet::new();
        task.spawn_on(announcement.run(session.clone()), session.runtime());
        self.announced.push_back(task);
        self.announced.drain(..self.announced.len().saturating_sub(KEPT));
        Published::new(number, bytes, copied_in, seen)
    }
}

fn publisher_config(session: &Session) -> Result<PublisherConfig, Error> {
    let config = session.config();
    let WeightServer { listen, advertise, links, dials, hash_threads, single, shm, export, sender } =
        config.weights.clone();
    let listen = match listen {
        None if dials => SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
        Some(listen) => listen,
        None => SocketAddr::new(session.client().facing_address()?, 0),
    };
    if listen.ip().is_unspecified() && advertise.is_empty() && !dials {
        let what = format!("receivers cannot dial {listen}; name addresses in `weights.advertise`");
        return Err(Invalid::rule("weights.listen", what).into());
    }
    let hash_threads = hash_threads.max(1);
    let shm = arena(shm, sender, &config.job, session.client().manager());
    let base = PublisherConfig::loopback(&config.job, config.epoch);
    Ok(PublisherConfig { listen, advertise, links, hash_threads, single, shm, export, ..base })
}

/// Shared memory of this process's versions.
fn arena(shm: Shm, sender: Option<Sender>, job: &str, manager: &str) -> Option<ShmArena> {
    match (shm, sender) {
        // Several senders may well be on one host.
        (Shm::Auto, Some(Sender { index, .. })) => {
            Some(ShmArena::of_job(job, &format!("{manager} sender {index}")))
        }
        (Shm::Auto, None) => Some(ShmArena::of_job(job, manager)),
        (Shm::AutoAt { scope }, _) => Some(ShmArena::of_job(job, &scope)),
        (Shm::At(dir), _) => Some(ShmArena { dir, required: true }),
        (Shm::Off, _) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn senders_of_one_host_have_memory_of_their_own() {
        let dir = |shm, sender| arena(shm, sender, "job", "http://m:1").map(|arena| arena.dir);
        let sender = |index| Some(Sender { index, count: 2 });
        let alone = dir(Shm::Auto, None);
        let (first, second) = (dir(Shm::Auto, sender(0)), dir(Shm::Auto, sender(1)));
        assert!(alone.is_some() && first.is_some());
        assert!(alone != first && first != second);
        let named = dir(Shm::AutoAt { scope: "s".into() }, sender(0));
        assert_eq!(named, dir(Shm::AutoAt { scope: "s".into() }, sender(1)));
        assert_eq!(dir(Shm::Off, None), None);
    }

    #[tokio::test]
    async fn a_number_of_zero_is_refused_and_borrowed_work_runs_here() {
        let published = Publications::default();
        let error = published.publish(&Session::offline(), 0, &[]).await.expect_err("zero");
        assert!(error.to_string().contains("count from 1"), "{error}");
        let data = [1, 2, 3];
        assert_eq!(in_place(|| data.iter().sum::<i32>()), 6);
    }
}
