//! The place where figures are made: hosts on loopback or in network namespaces, one key, one folder of logs, one
//! staging root. Owns those; what the hosts do is the figure's business.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anabranch_proto::grant::{Grant, Role};
use anyhow::Context;
use tokio::process::Command;

use super::host::Host;
use super::order::{Listening, Order, Receive, Source, Train, VersionId};
use crate::workdir::WorkDir;

const JOB: &str = "bench";
/// Time without a byte after which a receiver gives up a stream.
pub const PROGRESS: Duration = Duration::from_secs(5);
/// Life of a grant: longer than any figure.
const GRANT_TTL: Duration = Duration::from_secs(3600);

/// Settings and folders that all figures share.
pub struct Lab {
    work: WorkDir,
    staging: PathBuf,
    divide: u64,
    key: [u8; 32],
    nonce: AtomicU64,
}

/// Loopback with any port.
pub const LOCAL: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

/// A host that serves, with its address.
pub struct Server {
    /// The host.
    pub host: Host,
    /// Address at which the host serves.
    pub addr: String,
}

impl Lab {
    /// Makes the folders. `dir` keeps the logs; all sizes are divided by `divide`.
    pub fn new(dir: Option<&Path>, divide: u64) -> anyhow::Result<Lab> {
        let work = WorkDir::new(dir.map(Path::to_owned), "transfer")?;
        let shm = Path::new("/dev/shm");
        let base = if shm.is_dir() { shm } else { work.path() };
        let staging = base.join(format!("anabranch-transfer-{}", std::process::id()));
        std::fs::create_dir_all(&staging)
            .with_context(|| format!("making {}", staging.display()))?;
        let key = blake3::hash(format!("{:?}", std::time::SystemTime::now()).as_bytes()).into();
        Ok(Lab { work, staging, divide, key, nonce: AtomicU64::new(1) })
    }

    /// `bytes`, divided by the run's `--divide`.
    pub fn size(&self, bytes: u64) -> u64 {
        bytes / self.divide
    }

    /// Folder for files of the run that are not logs.
    pub fn scratch(&self) -> &Path {
        self.work.path()
    }

    /// Staging area of a host.
    pub fn staging(&self, host: &str) -> PathBuf {
        self.staging.join(host)
    }

    /// Starts a process on this machine's loopback.
    pub fn local(&self, name: &str) -> anyhow::Result<Host> {
        let exe = std::env::current_exe().context("finding this program")?;
        self.start(name, Command::new(exe))
    }

    /// Starts a process by a command that ends in this program, such as one that enters a namespace.
    pub fn start(&self, name: &str, command: Command) -> anyhow::Result<Host> {
        Host::start(name, command, &self.work.path().join(format!("{name}.log")))
    }

    /// Makes `host` a trainer.
    pub async fn trainer(
        &self,
        host: Host,
        listen: SocketAddr,
        delta: bool,
    ) -> anyhow::Result<Server> {
        self.trainer_with(host, listen, delta, None).await
    }

    /// Makes `host` a trainer, perhaps with an arena; the first address is then that of the shared memory.
    pub async fn trainer_with(
        &self,
        host: Host,
        listen: SocketAddr,
        delta: bool,
        arena: Option<PathBuf>,
    ) -> anyhow::Result<Server> {
        let (key, job) = (hex::encode(self.key), JOB.to_owned());
        let order = Order::Train(Train { key, job, listen, epoch: 1, delta, arena });
        serving(host, order).await
    }

    /// Makes `host` a receiver. Another life of a host finds the staging area of the life before.
    pub async fn receiver(&self, host: Host, listen: SocketAddr) -> anyhow::Result<Server> {
        let (key, job) = (hex::encode(self.key), JOB.to_owned());
        let (staging, progress_ms) = (self.staging(&host.name), PROGRESS.as_millis() as u64);
        let order = Order::Receive(Receive { key, job, listen, staging, progress_ms });
        serving(host, order).await
    }

    /// `holder` as a source of `version` for `receiver`, with a grant.
    pub fn source(
        &self,
        holder: &Server,
        version: &VersionId,
        receiver: &str,
        stripes: &[u32],
    ) -> anyhow::Result<Source> {
        let grant = Grant {
            job: JOB.to_owned(),
            version: version.version()?,
            receiver: receiver.to_owned(),
            role: Role::Fetch,
            ttl_ms: GRANT_TTL.as_millis() as u64,
            nonce: self.nonce.fetch_add(1, Ordering::Relaxed),
        };
        Ok(Source {
            holder: holder.host.name.clone(),
            addr: holder.addr.clone(),
            grant: hex::encode(grant.mint(&self.key)),
            stripes: stripes.to_vec(),
            fallback_for: Vec::new(),
        })
    }

    /// Removes the files of the run, and the logs too if the run passed.
    pub fn close(self, passed: bool) -> anyhow::Result<()> {
        std::fs::remove_dir_all(&self.staging)
            .with_context(|| format!("removing {}", self.staging.display()))?;
        self.work.close(passed)
    }
}

async fn serving(host: Host, order: Order) -> anyhow::Result<Server> {
    let Listening { addrs } = host.ask(order).await?;
    let addr = addrs.into_iter().next().with_context(|| format!("{} has no address", host.name))?;
    Ok(Server { host, addr })
}
