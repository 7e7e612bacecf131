//! Watch over the engine process: starts the process if a command was given, tells the core when
//! the engine answers and when it is gone. Decides only when to start a process again.
//!
//! ```text
//!   (start) ─► wait until it answers ─► probe ─► EngineUp ─► look each second ─► EngineDown ─► (stop, back off)
//!      ▲                                                                                           │
//!      └───────────────────────────────────────────────────────────────────────────────────────────┘
//! ```

use std::sync::Arc;
use std::time::Duration;

use anabranch_runtime::process::{Output, StartError};
use anabranch_runtime::{Backoff, BackoffConfig, Child, Drain};
use tokio::time::{Instant, sleep};

use crate::calls;
use crate::core::Event;
use crate::engine::{Engine, EngineError, EngineInfo, relay};
use crate::launch::Launch;
use crate::shared::Shared;
use crate::weights::Weights;

/// Everything that the watcher needs.
pub struct Watch<E> {
    pub shared: Arc<Shared>,
    pub engine: Arc<E>,
    pub weights: Arc<Weights>,
    /// The command that starts the engine; `None` if somebody else starts it.
    pub launch: Option<Launch>,
    /// Time for a started process to answer.
    pub start_timeout: Duration,
    pub drain: Drain,
    /// Name of the engine in logs.
    pub url: String,
}

/// Time between looks at a healthy engine.
const LOOK: Duration = Duration::from_secs(1);
/// Time between tries while the engine starts.
const KNOCK: Duration = Duration::from_millis(200);
/// Looks without an answer after which the engine counts as dead: it is stopped, or its machine is
/// gone.
const MAX_TIMEOUTS: u32 = 2;
/// Time for an engine process to end on SIGTERM.
const STOP_PATIENCE: Duration = Duration::from_secs(10);
/// Time between log lines while the engine does not answer.
const REMIND: Duration = Duration::from_secs(30);

impl<E: Engine> Watch<E> {
    /// Watches until the drain closes. Fails only if the engine process cannot be started.
    pub async fn run(self) -> Result<(), StartError> {
        let mut backoff = Backoff::new(BackoffConfig::default()).expect("the default is valid");
        loop {
            let mut child = self.start().await?;
            let began = Instant::now();
            let why = self.one_life(&mut child).await;
            if let Some(child) = &mut child
                && let Err(error) = child.terminate(STOP_PATIENCE).await
            {
                tracing::warn!(%error, "could not stop the engine process");
            }
            if self.drain.is_cancelled() {
                return Ok(());
            }
            let will_restart = self.launch.is_some();
            tracing::warn!(why, will_restart, "the engine is down");
            self.shared.handle(Event::EngineDown { why, will_restart });
            if began.elapsed() > STEADY {
                backoff.reset();
            }
            if will_restart {
                self.pause(backoff.next_delay()).await;
            }
        }
    }

    async fn start(&self) -> Result<Option<Child>, StartError> {
        let Some(launch) = &self.launch else { return Ok(None) };
        let added = launch.added.join(" ");
        let child =
            Child::start(&launch.name(), launch.command(), Output::Log, &self.drain).await?;
        tracing::info!(pid = child.id(), url = self.url, added, "started the engine");
        Ok(Some(child))
    }

    /// One life of the engine, from start to end; returns why it ended.
    async fn one_life(&self, child: &mut Option<Child>) -> String {
        let watched = async {
            let info = self.until_it_answers().await?;
            self.announce(info).await;
            Err(self.until_it_fails().await)
        };
        tokio::select! {
            result = watched => match result {
                Ok(never) => never,
                Err(why) => why,
            },
            why = ended(child) => why,
            () = self.drain.cancelled() => "the agent leaves".to_owned(),
        }
    }

    async fn until_it_answers(&self) -> Result<EngineInfo, String> {
        let began = Instant::now();
        let mut reminded = began;
        let mut said = false;
        loop {
            match self.engine.info().await {
                Ok(info) => return Ok(info),
                Err(error) if self.launch.is_some() && began.elapsed() > self.start_timeout => {
                    return Err(format!(
                        "no answer {:?} after its start: {error}",
                        self.start_timeout
                    ));
                }
                Err(error) => {
                    if !said || reminded.elapsed() > REMIND {
                        tracing::info!(url = self.url, %error, "waiting for the engine");
                        (said, reminded) = (true, Instant::now());
                    }
                }
            }
            sleep(KNOCK).await;
        }
    }

    /// Probes the start-up weights and tells the core that the engine is up.
    async fn announce(&self, info: EngineInfo) {
        self.weights.engine_started(info.model_directory.as_deref());
        if !info.incremental {
            tracing::warn!(
                "this engine repeats every token in each chunk: start it with --incremental-streaming-output; until then chunks come seldom and more tokens are at risk"
            );
        }
        if info.model.vocab == 0 && info.kind != relay::KIND {
            tracing::warn!(
                "the engine does not say its vocabulary and its config.json cannot be read here: token ids go unchecked"
            );
        }
        let probe = calls::probe(&*self.engine, info.model.vocab).await;
        let probe = probe
            .inspect_err(|error| tracing::warn!(error, "no probe of the start-up weights"))
            .ok();
        tracing::info!(
            url = self.url,
            kind = info.kind,
            model = info.model.id,
            vocab = info.model.vocab,
            context = info.model.max_context,
            kv_tokens = info.kv_tokens,
            "engine is up"
        );
        self.shared.handle(Event::EngineUp { info: Box::new(info), probe });
    }

    async fn until_it_fails(&self) -> String {
        let mut timeouts = 0;
        loop {
            tokio::select! {
                () = sleep(LOOK) => {}
                () = self.shared.check_engine.notified() => {}
            }
            match self.look().await {
                Ok(()) => timeouts = 0,
                Err(Look::Slow(why)) if timeouts + 1 < MAX_TIMEOUTS => {
                    timeouts += 1;
                    tracing::warn!(why, "the engine is slow to answer");
                }
                Err(Look::Slow(why) | Look::Gone(why)) => return why,
            }
        }
    }

    async fn look(&self) -> Result<(), Look> {
        let before = self.shared.expected_label();
        match self.engine.alive().await {
            Ok(label) => self.same_weights(before, label)?,
            Err(error @ EngineError::Timeout { .. }) => return Err(Look::Slow(error.to_string())),
            Err(error) => return Err(Look::Gone(error.to_string())),
        }
        match self.engine.utilization().await {
            Ok(now) => self.shared.handle(Event::UtilizationPolled(now)),
            Err(error) => tracing::debug!(%error, "the engine does not tell its load"),
        }
        Ok(())
    }

    /// Checks the label of the weights. A label that this agent did not give means a new process,
    /// or that somebody else loads weights here.
    fn same_weights(&self, before: Option<String>, label: String) -> Result<(), Look> {
        let after = self.shared.expected_label();
        match before {
            // Around a load there is nothing to compare with.
            Some(expected) if Some(&expected) == after.as_ref() && expected != label => {
                Err(Look::Gone(format!(
                    "its weights are {label:?}, not {expected:?}: it was restarted"
                )))
            }
            _ => Ok(()),
        }
    }

    async fn pause(&self, wait: Duration) {
        tokio::select! {
            () = sleep(wait) => {}
            () = self.drain.cancelled() => {}
        }
    }
}

/// Length of a life after which the next crash counts as the first.
const STEADY: Duration = Duration::from_secs(60);

/// Failure of a look.
enum Look {
    Slow(String),
    Gone(String),
}

async fn ended(child: &mut Option<Child>) -> String {
    match child {
        None => std::future::pending().await,
        Some(child) => match child.wait().await {
            Ok(status) => format!("its process ended: {status}"),
            Err(error) => format!("its process cannot be watched: {error}"),
        },
    }
}
