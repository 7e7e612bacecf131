//! A TCP proxy whose link can be stalled or cut, between an agent and its manager. Owns its listener and its
//! connections; knows nothing of what passes through.
//!
//! ```text
//!   Pass <--> Stall   (bytes wait in the kernel's buffers, as on a lost route)
//!     ^---> Cut       (connections are closed, new ones too, as with a firewall or a restarted router)
//! ```

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anabranch_runtime::Drain;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use crate::tap::Tap;

/// Size of a copy, and so the bytes that a stalled link takes before it stops.
const BUFFER_BYTES: usize = 64 << 10;

/// Pause after a failed accept (out of file descriptors), so that the loop does not spin.
const ACCEPT_RETRY: Duration = Duration::from_millis(50);

/// State of the proxy's link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Link {
    /// Bytes pass.
    Pass,
    /// Bytes wait in the kernel's buffers.
    Stall,
    /// Connections are closed.
    Cut,
}

/// A proxy that listens.
#[derive(Debug)]
pub struct Proxy {
    addr: SocketAddr,
    link: watch::Sender<Link>,
}

impl Proxy {
    /// Listens on a free loopback port and passes on to `target`; `tap` sees all that passes. Ends with `drain`.
    pub async fn start(
        target: SocketAddr,
        tap: Option<Arc<Tap>>,
        drain: &Drain,
    ) -> std::io::Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
        let addr = listener.local_addr()?;
        let (link, seen) = watch::channel(Link::Pass);
        let (route, tasks) = (Route { target, link: seen, tap }, drain.clone());
        drain.spawn("proxy", async move {
            tokio::select! {
                () = accept(&listener, &route, &tasks) => {}
                () = tasks.cancelled() => {}
            }
        });
        Ok(Self { addr, link })
    }

    /// Address at which the proxy listens.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Sets the state of all connections.
    pub fn set(&self, link: Link) {
        self.link.send_replace(link);
    }
}

/// Target of the connections, and what is asked at each step.
#[derive(Clone)]
struct Route {
    target: SocketAddr,
    link: watch::Receiver<Link>,
    tap: Option<Arc<Tap>>,
}

async fn accept(listener: &TcpListener, route: &Route, tasks: &Drain) {
    let mut connection = 0;
    loop {
        let client = match listener.accept().await {
            Ok((client, _)) => client,
            Err(error) => {
                tracing::warn!(%error, "the proxy cannot accept a connection");
                tokio::time::sleep(ACCEPT_RETRY).await;
                continue;
            }
        };
        if *route.link.borrow() == Link::Cut {
            continue;
        }
        connection += 1;
        let (route, stop) = (route.clone(), tasks.clone());
        tasks.spawn("proxied connection", async move {
            tokio::select! {
                () = route.relay(client, connection) => {}
                () = stop.cancelled() => {}
            }
        });
    }
}

impl Route {
    /// Copies both ways until either side ends or the link is cut.
    async fn relay(self, client: TcpStream, connection: u64) {
        let Ok(server) = TcpStream::connect(self.target).await else { return };
        for socket in [&client, &server] {
            // Without it the proxy would add delays that the real link has not.
            let _ = socket.set_nodelay(true);
        }
        let (from_client, to_client) = client.into_split();
        let (from_server, to_server) = server.into_split();
        tokio::select! {
            () = self.pump(from_client, to_server, (connection, true)) => {}
            () = self.pump(from_server, to_client, (connection, false)) => {}
            () = until(self.link.clone(), |link| link == Link::Cut) => {}
        }
    }

    async fn pump(
        &self,
        mut from: impl AsyncRead + Unpin,
        mut to: impl AsyncWrite + Unpin,
        (connection, from_client): (u64, bool),
    ) {
        let mut buf = vec![0; BUFFER_BYTES];
        loop {
            let Ok(len @ 1..) = from.read(&mut buf).await else { return };
            until(self.link.clone(), |link| link == Link::Pass).await;
            if to.write_all(&buf[..len]).await.is_err() {
                return;
            }
            if let Some(tap) = &self.tap {
                tap.saw(connection, from_client, &buf[..len]);
            }
        }
    }
}

/// Waits until the link is in a state that `is` accepts. Without a proxy, waits for ever: its drain ends the task.
async fn until(mut link: watch::Receiver<Link>, is: impl Fn(Link) -> bool) {
    if link.wait_for(|link| is(*link)).await.is_err() {
        std::future::pending::<()>().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn pair() -> (Drain, Proxy, TcpStream, TcpStream) {
        let (drain, server) = (Drain::new(), TcpListener::bind(("127.0.0.1", 0)).await.unwrap());
        let proxy = Proxy::start(server.local_addr().unwrap(), None, &drain).await.unwrap();
        let client = TcpStream::connect(proxy.addr()).await.unwrap();
        let (server, _) = server.accept().await.unwrap();
        (drain, proxy, client, server)
    }

    #[tokio::test]
    async fn bytes_pass_both_ways_and_a_stalled_link_delivers_them_later() {
        let (drain, proxy, mut client, mut server) = pair().await;
        let mut buf = [0; 4];
        client.write_all(b"ping").await.unwrap();
        server.read_exact(&mut buf).await.unwrap();
        assert_eq!(&buf, b"ping");
        proxy.set(Link::Stall);
        server.write_all(b"pong").await.unwrap();
        let early =
            tokio::time::timeout(Duration::from_millis(100), client.read_exact(&mut buf)).await;
        assert!(early.is_err(), "nothing passes while it is stalled");
        proxy.set(Link::Pass);
        client.read_exact(&mut buf).await.unwrap();
        assert_eq!(&buf, b"pong");
        drain.close(Duration::from_secs(5)).await.unwrap();
    }

    #[tokio::test]
    async fn a_cut_ends_connections_and_refuses_new_ones_until_it_passes_again() {
        let (drain, proxy, mut client, mut server) = pair().await;
        proxy.set(Link::Cut);
        assert_eq!(client.read(&mut [0; 4]).await.unwrap_or(0), 0);
        assert_eq!(server.read(&mut [0; 4]).await.unwrap_or(0), 0);
        let mut refused = TcpStream::connect(proxy.addr()).await.unwrap();
        assert_eq!(refused.read(&mut [0; 4]).await.unwrap_or(0), 0);
        drain.close(Duration::from_secs(5)).await.unwrap();
    }
}
