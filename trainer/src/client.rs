//! The link to one manager: the channel, the token on every call, and trying again. Knows no job.

use std::future::Future;
use std::net::{IpAddr, ToSocketAddrs};
use std::sync::{Arc, RwLock};
use std::time::{Duration, Instant};

use anabranch_proto::limits::{MAX_MESSAGE_BYTES, MAX_SUBMIT_BYTES};
use anabranch_proto::pb::trainer_client::TrainerClient;
use anabranch_runtime::connect::{ConnectError, connect_to};
use anabranch_runtime::endpoint::Endpoint;
use anabranch_runtime::token::JoinToken;
use anabranch_runtime::{Backoff, BackoffConfig};
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;
use tonic::{Request, Status};

use crate::config::JobConfig;
use crate::error::{Error, Failure};
use crate::job::Job;
use crate::publish::address_facing;

/// Quick at first: most losses are a restart of the manager on the same machine.
const RETRY: BackoffConfig =
    BackoffConfig { first: Duration::from_millis(100), max: Duration::from_secs(3), factor: 2.0 };

/// Where everything starts.
pub struct Trainer;

/// A connected manager. Cheap to clone; all clones share one connection.
#[derive(Clone, Debug)]
pub struct Client {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    /// As the caller wrote it.
    manager: String,
    endpoint: Endpoint,
    token: Option<JoinToken>,
    channel: RwLock<Rpc>,
}

pub(crate) type Rpc = TrainerClient<InterceptedService<Channel, Bearer>>;

/// Puts `authorization: Bearer TOKEN` on every call.
#[derive(Clone, Debug)]
pub(crate) struct Bearer(Option<MetadataValue<Ascii>>);

/// Bounds a series of tries by a deadline.
pub(crate) struct Tries {
    call: &'static str,
    started: Instant,
    within: Duration,
    backoff: Backoff,
}

// === impl Trainer ===

impl Trainer {
    /// Dials `manager`: `http://HOST:PORT`, `https://HOST:PORT` (TLS, needs the token) or
    /// `file:PATH`, the announce file of a manager, which is read again after a loss.
    pub async fn connect(manager: &str, token: Option<&str>) -> Result<Client, Error> {
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
}

// === impl Client ===

impl Client {
    /// Starts the job, takes it up again, or joins it where another process opened it.
    pub async fn open(&self, config: JobConfig) -> Result<Job, Error> {
        Job::open(self.clone(), config).await
    }

    /// As it was given to [`Trainer::connect`].
    pub fn manager(&self) -> &str {
        &self.shared.manager
    }

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

    /// The channel dials a URL again by itself; an announce file may name a new one.
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

// === impl Tries ===

impl Tries {
    pub(crate) fn new(call: &'static str, within: Duration) -> Self {
        let backoff = Backoff::new(RETRY).expect("the bounds are constants and sound");
        Self { call, started: Instant::now(), within, backoff }
    }

    /// Nothing failed since the last success.
    pub(crate) fn is_first(&self) -> bool {
        self.backoff.tries() == 0
    }

    pub(crate) fn left(&self) -> Duration {
        self.within.saturating_sub(self.started.elapsed())
    }

    /// It worked: the next loss starts with its own deadline.
    pub(crate) fn reset(&mut self) {
        self.started = Instant::now();
        self.backoff.reset();
    }

    /// Waits before the next try, or says that the time is up.
    pub(crate) async fn pause(&mut self, detail: &str) -> Result<(), Error> {
        let delay = self.backoff.next_delay();
        if delay >= self.left() {
            let (call, within) = (self.call, self.within);
            return Err(Error::Unreachable { call, within, detail: detail.to_owned() });
        }
        tracing::debug!(call = self.call, ?delay, detail, "trying again");
        tokio::time::sleep(delay).await;
        Ok(())
    }
}
