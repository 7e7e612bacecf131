//! Starts and stops a manager: listener, tokens, certificate, loop, feed, announcement. The only place
//! that knows all parts.

use std::io::Write;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anabranch_proto::limits::{MAX_MESSAGE_BYTES, MAX_SUBMIT_BYTES};
use anabranch_proto::pb::admin_server::AdminServer;
use anabranch_proto::pb::agent_server::AgentServer;
use anabranch_proto::pb::trainer_server::TrainerServer;
use anabranch_runtime::safety::check_listen;
use anabranch_runtime::tls::Ca;
use anabranch_runtime::{
    Announce, Clock, Drain, Endpoint, Role, ServeOptions, TokenStore, UnixSeconds, bind, serve,
};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::announce::{AnnounceFile, Ready, Tokens, reachable};
use crate::config::ManagerConfig;
use crate::core::Core;
use crate::driver::Driver;
use crate::error::ManagerError;
use crate::ledger::Ledger;
use crate::view::feed;
use crate::view::metrics::Metrics;
use crate::view::notices::Notices;
use crate::wire::admin::AdminService;
use crate::wire::agent_link::AgentService;
use crate::wire::auth::Auth;
use crate::wire::effects::Effects;
use crate::wire::gate::{Gate, Life, Pulse};
use crate::wire::http;
use crate::wire::inbox::Inbox;
use crate::wire::ingress::TrainerService;

/// Streams are told at once; connections get so long to end.
const CONNECTIONS: Duration = Duration::from_secs(2);
const SHUTDOWN: Duration = Duration::from_secs(5);
/// The job that tokens printed at the start are for: any. A job of its own gets tokens by `manager token`.
const ANY_JOB: &str = "default";

/// A manager that runs. Drop does not stop it: call [`Manager::stop`].
pub struct Manager {
    local_addr: SocketAddr,
    ready: Ready,
    drain: Drain,
    driver: JoinHandle<()>,
    announced: Option<AnnounceFile>,
}

/// Runs until `shutdown`, printing how to attach engines when ready.
pub async fn run(config: ManagerConfig, shutdown: CancellationToken) -> Result<(), ManagerError> {
    let mut manager = Manager::start(config).await?;
    // Whoever started us may have closed its end; that is no reason to stop.
    let _ = writeln!(std::io::stdout(), "{}", manager.ready().text());
    let ended = tokio::select! {
        () = shutdown.cancelled() => Ok(()),
        error = manager.failed() => Err(error),
    };
    tracing::info!("shutting down");
    ended.and(manager.stop().await)
}

impl Manager {
    /// Returns when the listener answers.
    pub async fn start(config: ManagerConfig) -> Result<Self, ManagerError> {
        check_listen(config.listen, config.tls, config.tls, config.insecure)?;
        let listener = bind(&config.listen.to_string()).await?;
        let local_addr = listener.local_addr().unwrap_or(config.listen);
        let ca = config.tls.then(|| Ca::load_or_create(&config.state_dir)).transpose()?;
        let tls =
            ca.as_ref().map(|ca| ca.server_config(&names(&config, local_addr))).transpose()?;
        let tokens = ca.as_ref().map(|ca| tokens(&config, ca, local_addr)).transpose()?;
        let auth = match &ca {
            Some(ca) => Auth::with_tokens(&config.state_dir, ca.digest())?,
            None => Auth::open(),
        };
        let drain = Drain::new();
        let (gate, driver) = assemble(&config, auth, &drain);
        if let Some(at) = &config.zmq {
            feed::start(at, gate.notices.clone(), &drain).await?;
        }
        let options = ServeOptions { shutdown_deadline: CONNECTIONS, ..ServeOptions::default() };
        drain.spawn("listener", serve(listener, router(gate), tls, drain.clone(), options));
        let ready = Ready::new(local_addr, config.tls, tokens);
        let announced =
            config.announce.as_deref().map(|path| AnnounceFile::write(path, &ready)).transpose()?;
        Ok(Self { local_addr, ready, drain, driver, announced })
    }

    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// Address and tokens.
    pub fn ready(&self) -> &Ready {
        &self.ready
    }

    /// Resolves only if the loop ends by itself.
    pub async fn failed(&mut self) -> ManagerError {
        // A panic in it has been logged by the drain.
        let _ = (&mut self.driver).await;
        ManagerError::CoreStopped
    }

    /// Ends every stream with a word, then waits for all tasks, a few seconds at most.
    pub async fn stop(self) -> Result<(), ManagerError> {
        let removed = self.announced.map(AnnounceFile::remove).transpose();
        self.drain.close(SHUTDOWN).await?;
        removed.map(|_| ())
    }
}

fn assemble(config: &ManagerConfig, auth: Auth, drain: &Drain) -> (Arc<Gate>, JoinHandle<()>) {
    let mut secret = [0; 32];
    getrandom::fill(&mut secret).expect("the kernel gives random bytes");
    let (clock, life) = (Clock::start(), Life::new(&secret));
    let core_config = crate::core::config::CoreConfig { secret, ..config.core.clone() };
    let (inbox, from) = Inbox::new(clock);
    let ledger = Arc::new(Ledger::new(config.ledger_shards, config.core.patience()));
    let notices = Arc::new(Notices::new(clock));
    let metrics = Arc::new(Metrics::new());
    let pulse = Arc::new(Pulse::default());
    let effects =
        Effects::new(ledger.clone(), notices.clone(), metrics.clone(), life, config.tick, clock);
    let driver = Driver {
        core: Core::new(core_config, clock.now()),
        effects,
        inbox: from,
        clock,
        pulse: pulse.clone(),
        stop: drain.token(),
    };
    let gate =
        Gate { inbox, ledger, notices, metrics, auth, life, drain: drain.clone(), clock, pulse };
    gate.pulse.beat(&clock);
    (Arc::new(gate), drain.spawn("driver", driver.run()))
}

fn router(gate: Arc<Gate>) -> axum::Router {
    let agent = AgentServer::new(AgentService { gate: gate.clone() })
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_SUBMIT_BYTES);
    let trainer = TrainerServer::new(TrainerService { gate: gate.clone() })
        .max_decoding_message_size(MAX_SUBMIT_BYTES)
        .max_encoding_message_size(MAX_SUBMIT_BYTES);
    let admin = AdminServer::new(AdminService { gate: gate.clone() })
        .max_encoding_message_size(MAX_SUBMIT_BYTES);
    tonic::service::Routes::new(agent)
        .add_service(trainer)
        .add_service(admin)
        .into_axum_router()
        .merge(http::router(gate))
        .fallback(http::nothing_here)
}

/// For the certificate: what was asked for, and how this host is reached anyway.
fn names(config: &ManagerConfig, listening: SocketAddr) -> Vec<String> {
    let own =
        ["localhost".to_owned(), "127.0.0.1".to_owned(), reachable(listening).ip().to_string()];
    let mut names = config.tls_names.clone();
    names.extend(own);
    names.sort();
    names.dedup();
    names
}

/// One token a role, kept in the state directory, so that the lines printed at the first start stay good.
fn tokens(config: &ManagerConfig, ca: &Ca, listening: SocketAddr) -> Result<Tokens, ManagerError> {
    let mut store = TokenStore::open(&config.state_dir, ca.digest())?;
    let url = Ready::new(listening, true, None).url;
    let mut token = |role: Role| -> Result<_, ManagerError> {
        let path = config.state_dir.join(format!("{role}.json"));
        let now = UnixSeconds::now();
        let kept = Endpoint::File(path.clone()).resolve().ok().and_then(|(_, token)| token);
        let good = kept.filter(|token| store.verify(token, role, now).is_ok());
        let token = match good {
            Some(token) => token,
            None => store.issue(role, ANY_JOB, None, now)?,
        };
        // With this life's address: `--manager file:STATE/agent.json` works as it is.
        Announce { url: url.clone(), token: Some(token.to_string()) }.write(&path)?;
        Ok(token)
    };
    Ok(Tokens {
        agent: token(Role::Agent)?,
        trainer: token(Role::Trainer)?,
        admin: token(Role::Admin)?,
    })
}
