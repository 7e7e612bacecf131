//! The life of an engine: binding, the accept loop and the end. One hyper connection task for each client, in a set
//! that this module owns; the engine itself is a thread of its own, never on the async workers.

use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;

use crate::config::{EngineConfig, EngineError, ModelSpec};
use crate::driver::{Command, Driver, Shared};
use crate::http::{self, App, ModelFacts};
use crate::meter::Meter;
use crate::model::{Model, Synthetic};

/// Commands between two looks of the engine thread; above it, calls get a 503.
const COMMAND_QUEUE: usize = 16_384;
/// Pause after a failed accept (out of file descriptors), so that the loop does not spin.
const ACCEPT_RETRY: Duration = Duration::from_millis(50);

/// An engine that listens and whose model is loaded; [`Server::run`] serves it.
pub struct Server {
    listener: TcpListener,
    local_addr: SocketAddr,
    router: Router,
    faults: bool,
    commands: SyncSender<Command>,
    /// Resolves when the engine thread ends; to an error if it panicked.
    ended: oneshot::Receiver<()>,
}

impl Server {
    /// Listens, loads the model and starts the engine thread. Fails if a setting is wrong, the address is taken, or the
    /// model cannot be loaded.
    pub async fn bind(config: EngineConfig) -> Result<Self, EngineError> {
        config.check()?;
        let listener = TcpListener::bind(config.listen)
            .await
            .map_err(|source| EngineError::Listen { addr: config.listen, source })?;
        let local_addr = listener
            .local_addr()
            .map_err(|source| EngineError::Listen { addr: config.listen, source })?;
        let (app, ended) = start(config).await?;
        let (faults, commands) = (app.config.faults, app.commands.clone());
        Ok(Self {
            listener,
            local_addr,
            router: http::router(Arc::new(app)),
            faults,
            commands,
            ended,
        })
    }

    /// Address that the engine listens on, with its real port.
    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// Serves until `stop` is cancelled, then cuts every connection. Fails if the engine itself failed.
    pub async fn run(mut self, stop: CancellationToken) -> Result<(), EngineError> {
        let mut connections = JoinSet::new();
        let result = loop {
            tokio::select! {
                accepted = self.listener.accept() => match accepted {
                    Ok((stream, _)) => { connections.spawn(serve(stream, self.router.clone(), self.faults)); }
                    Err(error) => {
                        tracing::warn!(%error, "cannot accept a connection");
                        tokio::time::sleep(ACCEPT_RETRY).await;
                    }
                },
                Some(_) = connections.join_next() => {}
                ended = &mut self.ended => break ended.map_err(|_| EngineError::Panicked),
                () = stop.cancelled() => break Ok(()),
            }
        };
        if result.is_ok() {
            self.stop_engine().await;
        }
        connections.shutdown().await;
        result
    }

    async fn stop_engine(&mut self) {
        let commands = self.commands.clone();
        // A full queue is emptied by the engine within a step.
        let _ = tokio::task::spawn_blocking(move || commands.send(Command::Stop)).await;
        let _ = (&mut self.ended).await;
    }
}

async fn start(config: EngineConfig) -> Result<(App, oneshot::Receiver<()>), EngineError> {
    match &config.model {
        ModelSpec::Synthetic(params) => {
            let model = Synthetic::new(*params, &config);
            let facts = ModelFacts {
                name: "synthetic".to_owned(),
                kind: "anabranch_synthetic".to_owned(),
                architecture: "AnabranchSynthetic".to_owned(),
                vocab: model.vocab(),
                eos_ids: model.eos_ids().to_vec(),
            };
            launch(model, facts, "synthetic".to_owned(), config)
        }
        #[cfg(feature = "candle")]
        ModelSpec::Hf(dir) => {
            let (dir, for_load) = (dir.clone(), config.clone());
            let path = dir.display().to_string();
            let loaded =
                tokio::task::spawn_blocking(move || crate::hf::Hf::open(&dir, &for_load)).await;
            let (model, facts, context) = loaded.map_err(|_| EngineError::Panicked)??;
            let config =
                EngineConfig { context_capacity: config.context_capacity.min(context), ..config };
            launch(model, facts, path, config)
        }
        #[cfg(not(feature = "candle"))]
        ModelSpec::Hf(_) => Err(EngineError::NoCandle),
    }
}

fn launch<M: Model>(
    model: M,
    facts: ModelFacts,
    path: String,
    config: EngineConfig,
) -> Result<(App, oneshot::Receiver<()>), EngineError> {
    let (commands, inbox) = sync_channel(COMMAND_QUEUE);
    let shared = Arc::new(Shared::default());
    let meter = match &config.meter {
        Some(path) => Some(
            Meter::create(path)
                .map_err(|source| EngineError::Meter { path: path.clone(), source })?,
        ),
        None => None,
    };
    let driver =
        Driver::new(model, &config, path, (commands.clone(), inbox), shared.clone(), meter);
    let (end, ended) = oneshot::channel();
    let body = move || {
        driver.run();
        let _ = end.send(());
    };
    std::thread::Builder::new()
        .name("anabranch-engine".to_owned())
        .spawn(body)
        .map_err(EngineError::Thread)?;
    Ok((App { config, commands, shared, model: facts, started: Instant::now() }, ended))
}

async fn serve(stream: TcpStream, router: Router, faults: bool) {
    let _ = stream.set_nodelay(true);
    let reset = CancellationToken::new();
    // A second handle on the socket, so that a reset can be asked for while hyper owns the first.
    let handle = if faults { stream.as_fd().try_clone_to_owned().ok() } else { None };
    let service = {
        let reset = reset.clone();
        service_fn(move |mut request: hyper::Request<Incoming>| {
            request.extensions_mut().insert(reset.clone());
            router.clone().oneshot(request.map(Body::new))
        })
    };
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .serve_connection(TokioIo::new(stream), service);
    tokio::select! {
        // First, because the streams that a reset cuts end in the same moment and would say so properly.
        biased;
        () = reset.cancelled() => linger_off(handle),
        // Errors here are clients that left; their sequences are swept by the engine.
        _ = connection => {}
    }
}

/// Makes the close that follows a TCP reset instead of a clean end.
fn linger_off(handle: Option<OwnedFd>) {
    if let Some(handle) = handle {
        let _ = rustix::net::sockopt::set_socket_linger(&handle, Some(Duration::ZERO));
    }
}
