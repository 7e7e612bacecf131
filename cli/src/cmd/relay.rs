//! `anabranch relay`: holds weight versions for receivers that cannot reach the trainer, or are many. A relay is an
//! agent without an engine.

use std::net::SocketAddr;
use std::path::PathBuf;

use anabranch_agent::config::{AgentConfig, EngineSpec};
use anabranch_agent::{LinkKind, Listen};

use crate::failure::Outcome;
use crate::link::ManagerArgs;

/// Flags of `anabranch relay`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example, on a host that both sides can reach:\n  \
    anabranch relay --manager https://10.0.0.1:5000 --token ab1... --listen 0.0.0.0:5600 --advertise relay.example:5600")]
pub struct Args {
    #[command(flatten)]
    manager: ManagerArgs,
    /// Name of the relay, stable over restarts [default: relay- and the host name]
    #[arg(long)]
    id: Option<String>,
    /// Address at which receivers fetch
    #[arg(long, visible_alias = "weights-listen", default_value = "127.0.0.1:5600")]
    listen: SocketAddr,
    /// tcp (in the clear), tls or quic; may be given more than once, best first [default: tcp on loopback, else tls]
    #[arg(long, value_name = "LINK")]
    weights_link: Vec<LinkKind>,
    /// Addresses that receivers shall dial, if not the listener's own; may be given more than once
    #[arg(long)]
    advertise: Vec<String>,
    /// Directory in which versions are held: two must fit
    #[arg(long, default_value = "/dev/shm")]
    staging: PathBuf,
}

/// Runs the command.
pub async fn run(args: Args) -> Outcome {
    let (links, advertise) = (args.weights_link, args.advertise);
    let base = AgentConfig::new(args.manager.manager, EngineSpec::Relay);
    super::agent::run_agent(AgentConfig {
        token: args.manager.token,
        id: args.id,
        listen: Some(Listen { at: args.listen, links, advertise }),
        staging: args.staging,
        ..base
    })
    .await
}
