//! The link to one manager: its channel, the token on every call, and calls that are tried again. Knows no
//! job.

use std::future::Future;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs, UdpSocket};
use std::sync::{Arc, RwLock};
use std::time::Duration;

use anabranch_proto::limits::{MAX_MESSAGE_BYTES, MAX_SUBMIT_BYTES};
use anabranch_proto::pb::trainer_client::TrainerClient;
use anabranch_runtime::connect::{ConnectError, connect_to};
use anabranch_runtime::endpoint::Endpoint;
use anabranch_runtime::token::JoinToken;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;
use tonic::{Request, Status};

use crate::error::{Error, Failure};
use crate::retry::Tries;

/// A connected manager. Cheap to clone; all clones share one connection.
#[derive(Clone, Debug)]
pub struct Client {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    /// Address as the caller wrote it.
    manager: String,
    endpoint: Endpoint,
    token: Option<JoinToken>,
    channel: RwLock<Rpc>,
}

/// The generated stub, with the token on every call.
pub(crate) type Rpc = TrainerClient<InterceptedService<Channel, Bearer>>;

/// Puts `authorization: Bearer TOKEN` on every call.
#[derive(Clone, Debug)]
pub(crate) struct Bearer(Option<MetadataValue<Ascii>>);

// === impl Client ===

impl Client {
    /// Dials `manager`: `http://HOST:PORT`, `https://HOST:PORT` (TLS; needs the join token `token`) or
    /// `file:PATH`, the announce file of a manager, which is read again after a loss.
    ///
    /// Fails at once if nobody answers there: [`Error::Unreachable`], which may be tried again.
    pub async fn connect(manager: &str, token: Option<&str>) -> Result<Self, Error> {
        let bad = |why: String| Error::Address { manager: manager.to_owned(), why };
        let endpoint = Endpoint::parse(manager).map_err(|error| bad(error.to_string()))?;
        let token = token.map(JoinToken::parse).transpose().map_err(|e| bad(e.to_string()))?;
        let rpc = dial(&endpoint, token.as_ref()).await.map_err(|error| match error {
            ConnectError::Endpoint(_) | ConnectError::NeedsToken { .. } => bad(error.to_string()),
            ConnectError::WrongPin { .. } => {
                Error::NotPermitted { call: "connect", why: error.to_string() }
            }
            _ => {
                let (within, detail) = (Duration::ZERO, error.to_string());
                Error::Unreachable { call: "connect", within, detail }
            }
        })?;
        let channel = RwLock::new(rpc);
        let shared = Shared { manager: manager.to_owned(), endpoint, token, channel };
        Ok(Client { shared: Arc::new(shared) })
    }

    /// Address of the manager, as it was given to [`Client::connect`].
    pub fn manager(&self) -> &str {
        &self.shared.manager
    }

    /// Stub for one call.
    pub(crate) fn rpc(&self) -> Rpc {
        self.shared.channel.read().expect("no code panics while it holds this lock").clone()
    }

    /// The address of this host that the manager, and so its engines, are likely to reach.
    pub(crate) fn facing_address(&self) -> Result<IpAddr, Error> {
        let bad = |why: String| Error::Address { manager: self.shared.manager.clone(), why };
        let (endpoint, _) = self.shared.endpoint.resolve().map_err(|e| bad(e.to_string()))?;
        let (Endpoint::Plain(at) | Endpoint::Tls(at)) = endpoint else {
            return Err(bad("it names no host".into()));
        };
        let mut found =
            (at.host.as_str(), at.port).to_socket_addrs().map_err(|e| bad(e.to_string()))?;
        let to = found.next().ok_or_else(|| bad("its host has no address".into()))?;
        address_facing(to).map_err(|error| bad(format!("no route to it: {error}")))
    }

    /// Reads an announce file again, which may name a new address. A URL needs nothing: the channel dials it
    /// again by itself.
    pub(crate) async fn after_loss(&self) {
        if !matches!(self.shared.endpoint, Endpoint::File(_)) {
            return;
        }
        match dial(&self.shared.endpoint, self.shared.token.as_ref()).await {
            Ok(rpc) => {
                *self.shared.channel.write().expect("no code panics while it holds this lock") = rpc
            }
            Err(error) => tracing::debug!(%error, "the manager is not back yet"),
        }
    }

    /// Makes an idempotent call until it gets an answer. `within` bounds the whole.
    pub(crate) async fn call<T, F, Fut>(
        &self,
        call: &'static str,
        within: Duration,
        mut once: F,
    ) -> Result<T, Failure>
    where
        F: FnMut(Rpc) -> Fut,
        Fut: Future<Output = Result<tonic::Response<T>, Status>>,
    {
        let mut tries = Tries::new(call, within);
        loop {
            let failure = match tokio::time::timeout(tries.left(), once(self.rpc())).await {
                Ok(Ok(reply)) => return Ok(reply.into_inner()),
                Ok(Err(status)) => Failure::of(call, &status),
                Err(_) => Failure::Transport("no answer".into()),
            };
            let Failure::Transport(detail) = failure else { return Err(failure) };
            tries.pause(&detail).await.map_err(Failure::Final)?;
            self.after_loss().await;
        }
    }
}

/// The address of this host that a connection to `to` would come from.
fn address_facing(to: SocketAddr) -> std::io::Result<IpAddr> {
    let any: IpAddr = match to {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    // Connecting a UDP socket sends nothing; it only picks the route.
    let socket = UdpSocket::bind(SocketAddr::new(any, 0))?;
    socket.connect(to)?;
    Ok(socket.local_addr()?.ip())
}

async fn dial(endpoint: &Endpoint, token: Option<&JoinToken>) -> Result<Rpc, ConnectError> {
    let channel = connect_to(endpoint, token).await?;
    let announced = endpoint.resolve().ok().and_then(|(_, token)| token);
    let bearer = Bearer::new(token.or(announced.as_ref()));
    Ok(TrainerClient::with_interceptor(channel, bearer)
        .max_encoding_message_size(MAX_SUBMIT_BYTES)
        .max_decoding_message_size(MAX_MESSAGE_BYTES))
}

// === impl Bearer ===

impl Bearer {
    fn new(token: Option<&JoinToken>) -> Self {
        Bearer(token.map(|token| {
            let mut value = MetadataValue::try_from(format!("Bearer {token}"))
                .expect("a parsed token is printable ASCII");
            value.set_sensitive(true);
            value
        }))
    }
}

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(value) = &self.0 {
            request.metadata_mut().insert("authorization", value.clone());
        }
        Ok(request)
    }
}

#[cfg(test)]
impl Client {
    /// A client whose manager cannot be reached; needs a runtime.
    pub(crate) fn offline() -> Self {
        let manager = "http://127.0.0.1:1";
        let channel = tonic::transport::Endpoint::from_static(manager).connect_lazy();
        let rpc = TrainerClient::with_interceptor(channel, Bearer::new(None));
        let endpoint = Endpoint::parse(manager).expect("an address");
        let channel = RwLock::new(rpc);
        let shared = Shared { manager: manager.to_owned(), endpoint, token: None, channel };
        Self { shared: Arc::new(shared) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_facing_address_is_of_the_same_kind_as_the_managers() {
        let facing = |to: &str| address_facing(to.parse().expect("an address"));
        assert_eq!(facing("127.0.0.1:5000").expect("a route"), IpAddr::from([127, 0, 0, 1]));
        // A host without IPv6 has no route.
        assert!(facing("[::1]:5000").is_ok_and(|at| at.is_ipv6()) || facing("[::1]:5000").is_err());
    }

    #[test]
    fn the_token_goes_with_every_call_and_is_not_shown() {
        let value = MetadataValue::try_from("Bearer ab1.x").expect("ASCII");
        let mut bearer = Bearer(Some(value));
        let request = bearer.call(Request::new(())).expect("no check here");
        assert_eq!(request.metadata().get("authorization").expect("there"), "Bearer ab1.x");
        let bare = Bearer::new(None).call(Request::new(())).expect("no check here");
        assert!(bare.metadata().get("authorization").is_none());
    }
}
