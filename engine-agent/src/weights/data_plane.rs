//! The agent's connections to peers for bytes of weights: fetching from them and serving them.

use std::path::Path;

use anabranch_proto::address::Address;
use anabranch_transfer::{FetchRules, Fetcher, Holder, Listener, ServeLimits, Server, Staging};

/// State of the connections to peers.
pub enum DataPlane {
    /// No manager has given a key yet. The listener keeps the addresses that Hello announces.
    Reserved { listener: Option<Listener> },
    /// Versions are fetched and served.
    Open { fetcher: Fetcher, holder: Holder, server: Option<Server> },
}

impl DataPlane {
    /// Opens the data plane: serves at `listener`, and at `socket` for agents of this
    /// host.
    pub fn open(listener: Option<Listener>, socket: Option<&Path>, staging: &Staging) -> DataPlane {
        // Of any job: the manager's key says who may read.
        let holder = Holder::new("");
        let server = start_server(listener, socket, &holder);
        let fetcher = Fetcher::new(staging.clone(), holder.clone(), FetchRules::default());
        DataPlane::Open { fetcher, holder, server }
    }

    /// Addresses of the listener.
    pub fn addresses(&self) -> Vec<Address> {
        let addresses = match self {
            DataPlane::Reserved { listener } => listener.as_ref().map(Listener::addresses),
            DataPlane::Open { server, .. } => server.as_ref().map(Server::addresses),
        };
        addresses.unwrap_or_default()
    }
}

/// Starts serving; a failure is logged, and the agent only fetches.
fn start_server(
    listener: Option<Listener>,
    socket: Option<&Path>,
    holder: &Holder,
) -> Option<Server> {
    let limits = ServeLimits::default();
    let started = match (listener, socket) {
        (Some(listener), _) => Server::serve(listener, holder.clone(), limits).map(Some),
        (None, Some(_)) => Server::within_host(holder.clone(), limits).map(Some),
        (None, None) => Ok(None),
    };
    let started = started.and_then(|server| match (server, socket) {
        (Some(mut server), Some(socket)) => server.share(socket).map(|()| Some(server)),
        (server, _) => Ok(server),
    });
    started.unwrap_or_else(|error| {
        tracing::error!(%error, "peers cannot fetch from this agent");
        None
    })
}
