//! The listener for processes of the same host: a unix socket in a directory that only this user can
//! enter.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;

use super::{Arrived, Server, Shared, serve_stream};
use anabranch_proto::address::Address;

use crate::link::shm;
use crate::send::listen::ServeError;

/// Removed with its thread when dropped.
pub(super) struct LocalDoor {
    path: PathBuf,
    accept: Option<JoinHandle<()>>,
}

impl Server {
    /// Also serves those who connect to a socket at `path`, and passes them memory.
    pub(crate) fn listen_locally(&mut self, path: &Path) -> Result<(), ServeError> {
        let failed = |error| ServeError::Local { path: path.to_owned(), error };
        let listener = UnixListener::bind(path).map_err(failed)?;
        // The directory may be open to engines of other users.
        fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(failed)?;
        let accepting = Arc::clone(&self.shared);
        let accept = std::thread::Builder::new()
            .name("transfer-local".into())
            .spawn(move || accept_loop(&accepting, &listener))
            .map_err(ServeError::Thread)?;
        self.local = Some(LocalDoor { path: path.to_owned(), accept: Some(accept) });
        Ok(())
    }

    /// The socket that processes of this host connect to, if there is one.
    pub(crate) fn local_address(&self) -> Option<Address> {
        self.local.as_ref().map(|door| Address::Shm(door.path.clone()))
    }
}

fn accept_loop(shared: &Arc<Shared>, listener: &UnixListener) {
    for stream in listener.incoming() {
        if shared.closing() {
            return;
        }
        match stream {
            Ok(stream) => serve_stream(shared, Arrived::Link(Box::new(shm::link(stream)))),
            Err(error) => tracing::warn!(%error, "could not accept a stream of this host"),
        }
    }
}

impl Drop for LocalDoor {
    /// After the server was told to close.
    fn drop(&mut self) {
        // A connection of our own wakes `accept`; should it fail, the thread ends with the process.
        let woken = UnixStream::connect(&self.path).is_ok();
        if let Some(accept) = self.accept.take().filter(|_| woken) {
            accept.join().ok();
        }
        std::fs::remove_file(&self.path).ok();
    }
}
