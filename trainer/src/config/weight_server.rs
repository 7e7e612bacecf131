//! Settings of the server that a trainer's process serves its weights from.

use std::net::SocketAddr;
use std::path::PathBuf;

use anabranch_transfer::{LinkKind, Sender};

/// Server of the weights that this process publishes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WeightServer {
    /// Address to listen on. Default: a free port, on loopback if the manager is there, else on the
    /// address that faces it.
    pub listen: Option<SocketAddr>,
    /// HOST or HOST:PORT that receivers dial, if not the address listened on.
    pub advertise: Vec<String>,
    /// Links to offer, best first. Empty: tcp (in the clear) on loopback, tls anywhere else.
    pub links: Vec<LinkKind>,
    /// Receivers cannot reach this process, so it dials them. They need a listener (`--listen` of an agent
    /// or a relay). Default false.
    pub dials: bool,
    /// Threads that hash a version, at least 1. Default 1.
    pub hash_threads: usize,
    /// This process publishes one version only: no memory is reserved for a second. Default false.
    pub single: bool,
    /// Sharing of memory with engines of this host. Default [`Shm::Auto`].
    pub shm: Shm,
    /// Directory of a shared file system to write each version to as well, for engines that reach no
    /// socket of this process, or outlive it. They must see it under the same path. Default none.
    pub export: Option<PathBuf>,
    /// Number of this process among several that publish each version together, each from its own host or
    /// network card, with all of the tensors ([`crate::Job::publish`]) or a part of them
    /// ([`crate::Job::publish_part`]). Default: it publishes alone.
    pub sender: Option<Sender>,
}

/// Sharing of a version's memory with engines of this host, which else copy it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Shm {
    /// Shares if /dev/shm has room for the version; else the version lies in anonymous memory.
    #[default]
    Auto,
    /// Shares like `Auto`, in one of several processes of this host that publish for the job: processes of
    /// different scopes are different trainers.
    AutoAt {
        /// Name of the scope.
        scope: String,
    },
    /// Shares from this directory of a tmpfs; publishing fails without room there.
    At(PathBuf),
    /// Never shares.
    Off,
}

impl Default for WeightServer {
    fn default() -> Self {
        Self {
            listen: None,
            advertise: Vec::new(),
            links: Vec::new(),
            dials: false,
            hash_threads: 1,
            single: false,
            shm: Shm::Auto,
            export: None,
            sender: None,
        }
    }
}
