//! `anabranch manager`: flags over a settings file, and the tokens in its state directory.

use std::path::PathBuf;
use std::time::Duration;

use anabranch_manager::{ManagerConfig, ManagerError, RawConfig};
use anabranch_runtime::signal::shutdown_signal;
use anabranch_runtime::tls::Ca;
use anabranch_runtime::token::TokenId;
use anabranch_runtime::{Exit, Role, TokenStore, UnixSeconds, config};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use crate::failure::{Failure, OrExit, Outcome, exit_of};
use crate::table::{cells, table};

/// Flags of `anabranch manager`.
#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Args {
    #[command(subcommand)]
    what: Option<What>,
    #[command(flatten)]
    run: Run,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// Makes a join token and prints it
    Token {
        /// Role of the holder: agent, trainer or admin
        #[arg(long, default_value = "agent")]
        role: Role,
        /// Job that the token is for
        #[arg(long, default_value = "default")]
        job: String,
        /// Seconds that the token is good for [default: until it is revoked]
        #[arg(long)]
        ttl: Option<u64>,
        #[command(flatten)]
        at: StateDir,
    },
    /// Lists the join tokens, without their secrets
    Tokens {
        #[command(flatten)]
        at: StateDir,
        /// One JSON object, for scripts
        #[arg(long)]
        json: bool,
    },
    /// Makes a join token void
    Revoke {
        /// Id of the token, as `manager tokens` lists it
        id: String,
        #[command(flatten)]
        at: StateDir,
    },
}

#[derive(Debug, clap::Args)]
struct StateDir {
    /// State directory of the manager
    #[arg(long, env = "ANABRANCH_STATE_DIR")]
    state_dir: Option<PathBuf>,
}

/// Flags of the manager itself; each overrides the settings file.
#[derive(Debug, clap::Args)]
struct Run {
    /// Settings in TOML; unknown keys are refused
    #[arg(long)]
    config: Option<PathBuf>,
    /// HOST:PORT for gRPC and HTTP; port 0 takes a free one [default: 127.0.0.1:5000]
    #[arg(long)]
    listen: Option<String>,
    #[command(flatten)]
    at: StateDir,
    /// File that tells others on a shared disk the manager's address (--manager file:PATH)
    #[arg(long)]
    announce: Option<PathBuf>,
    /// Listen off loopback without TLS and tokens
    #[arg(long)]
    insecure: bool,
    /// TLS and tokens on loopback too
    #[arg(long)]
    tls: bool,
    /// A name or address for the certificate, beside the obvious ones; may be given more than once
    #[arg(long)]
    tls_name: Vec<String>,
    /// Events on a ZeroMQ PUB socket: ipc:///PATH or tcp://127.0.0.1:PORT
    #[arg(long)]
    zmq: Option<String>,
    /// Milliseconds between two sends of new tokens by an agent
    #[arg(long)]
    tick_ms: Option<u32>,
    /// Locks of the token ledger [default: twice the cores]
    #[arg(long)]
    ledger_shards: Option<usize>,
    /// Milliseconds of silence after which an agent gets no new work
    #[arg(long)]
    lease_ms: Option<u64>,
    /// Milliseconds after the lease in which an agent may come back before its samples move
    #[arg(long)]
    reattach_grace_ms: Option<u64>,
    /// Milliseconds without a new token after which a running sample is continued elsewhere
    #[arg(long)]
    progress_ms: Option<u64>,
    /// Prompt and answer tokens that may be admitted and not yet committed
    #[arg(long)]
    admission_tokens: Option<u64>,
}

/// Runs the command.
pub async fn run(args: Args) -> Outcome {
    match args.what {
        None => serve(args.run).await,
        Some(What::Token { role, job, ttl, at }) => issue(role, &job, ttl, &at),
        Some(What::Tokens { at, json }) => list(&at, json),
        Some(What::Revoke { id, at }) => {
            at.tokens()?.revoke(&TokenId::named(&id)).or_exit(Exit::Failed)?;
            println!("{id} is void");
            Ok(Exit::Ok)
        }
    }
}

async fn serve(run: Run) -> Outcome {
    let config = run.config()?;
    let stop = CancellationToken::new();
    let mut manager = std::pin::pin!(anabranch_manager::run(config, stop.clone()));
    tokio::select! {
        ended = &mut manager => return ended.map(|()| Exit::Ok).map_err(failure),
        signal = shutdown_signal() => {
            signal.or_exit(Exit::Io)?;
            stop.cancel();
        }
    }
    manager.await.map(|()| Exit::Ok).map_err(failure)
}

fn failure(error: ManagerError) -> Failure {
    Failure::new(exit_of(error.exit_code()), error)
}

fn issue(role: Role, job: &str, ttl: Option<u64>, at: &StateDir) -> Outcome {
    let ttl = ttl.map(Duration::from_secs);
    let token = at.tokens()?.issue(role, job, ttl, UnixSeconds::now()).or_exit(Exit::Usage)?;
    println!("{token}");
    Ok(Exit::Ok)
}

fn list(at: &StateDir, as_json: bool) -> Outcome {
    let store = at.tokens()?;
    if as_json {
        let grants: Vec<_> =
            store.iter().map(|(id, grant)| json!({"id": id, "grant": grant})).collect();
        println!("{}", json!({ "tokens": grants }));
        return Ok(Exit::Ok);
    }
    let mut rows = vec![cells(["ID", "ROLE", "JOB", "STATE"])];
    let now = UnixSeconds::now();
    for (id, grant) in store.iter() {
        let state = match grant.expires {
            _ if grant.revoked => "revoked".to_owned(),
            Some(at) if at <= now => "expired".to_owned(),
            Some(at) => format!("good for {} s", at.0 - now.0),
            None => "good".to_owned(),
        };
        rows.push(vec![id.to_string(), grant.role.to_string(), grant.job.clone(), state]);
    }
    print!("{}", table(&rows));
    Ok(Exit::Ok)
}

// === impl StateDir ===

impl StateDir {
    fn tokens(&self) -> Result<TokenStore, Failure> {
        let dir = self.state_dir.clone().unwrap_or_else(|| ManagerConfig::default().state_dir);
        let ca = Ca::load_or_create(&dir).or_exit(Exit::Data)?;
        TokenStore::open(&dir, ca.digest()).or_exit(Exit::Data)
    }
}

// === impl Run ===

impl Run {
    fn config(self) -> Result<ManagerConfig, Failure> {
        let mut raw: RawConfig = match &self.config {
            Some(path) => config::load(path).or_exit(Exit::Usage)?,
            None => RawConfig::default(),
        };
        raw.listen = self.listen.or(raw.listen);
        raw.state_dir = self.at.state_dir.or(raw.state_dir);
        raw.announce = self.announce.or(raw.announce);
        raw.insecure |= self.insecure;
        raw.tls = self.tls.then_some(true).or(raw.tls);
        raw.tls_names.extend(self.tls_name);
        raw.zmq = self.zmq.or(raw.zmq);
        raw.tick_ms = self.tick_ms.or(raw.tick_ms);
        raw.ledger_shards = self.ledger_shards.or(raw.ledger_shards);
        let core = &mut raw.core;
        core.lease_ms = self.lease_ms.unwrap_or(core.lease_ms);
        core.reattach_grace_ms = self.reattach_grace_ms.unwrap_or(core.reattach_grace_ms);
        core.progress_ms = self.progress_ms.unwrap_or(core.progress_ms);
        core.admission_tokens = self.admission_tokens.unwrap_or(core.admission_tokens);
        ManagerConfig::try_from(raw).or_exit(Exit::Usage)
    }
}
