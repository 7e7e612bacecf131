//! `anabranch relay`: holds versions of the weights for receivers that cannot reach the trainer, or are
//! many. An agent without an engine.

use std::net::SocketAddr;
use std::path::PathBuf;

use anabranch_agent::config::{AgentConfig, EngineSpec};
use anabranch_runtime::Exit;

use crate::failure::{Failure, Outcome};
use crate::link::ManagerArgs;

#[derive(Debug, clap::Args)]
#[command(after_help = "Example, on a host that both sides can reach:\n  \
    anabranch relay --manager https://10.0.0.1:5000 --token ab1... --listen 0.0.0.0:5600 --advertise relay.example:5600")]
pub struct Args {
    #[command(flatten)]
    manager: ManagerArgs,
    /// Its name, stable over restarts [default: relay- and the host name]
    #[arg(long)]
    id: Option<String>,
    /// Where receivers fetch from
    #[arg(long, default_value = "127.0.0.1:5600")]
    listen: SocketAddr,
    /// What receivers shall dial, where it is not the listener's own address; may be given more than once
    #[arg(long)]
    advertise: Vec<String>,
    /// Where versions are held: two must fit
    #[arg(long, default_value = "/dev/shm")]
    staging: PathBuf,
}

pub async fn run(args: Args) -> Outcome {
    if args.listen.ip().is_unspecified() && args.advertise.is_empty() {
        let text = format!(
            "--listen {} is no address that receivers can dial: name one with --advertise HOST:PORT",
            args.listen
        );
        return Err(Failure::new(Exit::Usage, text));
    }
    let base = AgentConfig::new(args.manager.manager, EngineSpec::Relay);
    super::agent::run_agent(AgentConfig {
        token: args.manager.token,
        id: args.id,
        listen: Some(args.listen),
        addresses: args.advertise,
        staging: args.staging,
        ..base
    })
    .await
}
