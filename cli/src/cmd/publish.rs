//! `anabranch publish`: a safetensors directory as a new version, served from here until every engine has it.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use anabranch_proto::Root;
use anabranch_runtime::Exit;
use anabranch_runtime::signal::ShutdownSignals;
use anabranch_trainer::{
    JobConfig, LinkKind, LoadStage, Part, Published, Sender, Shm, VersionState, VersionStatus,
};
use serde_json::json;

use crate::failure::{Failure, OrExit, Outcome};
use crate::link::ManagerArgs;
use crate::progress::Progress;

mod exchange;

use exchange::Exchange;

/// Flags of `anabranch publish`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    manager: ManagerArgs,
    /// Directory of *.safetensors, with the names, shapes and dtypes of the engines' own checkpoint
    dir: PathBuf,
    /// Job whose engines shall load the version
    #[arg(long, default_value = "default")]
    job: String,
    #[arg(long, default_value_t = 0)]
    epoch: u32,
    /// Number of the version [default: the job's current one plus 1]
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    number: Option<u64>,
    /// Addresses (HOST or HOST:PORT) that engines shall fetch from, if they cannot reach the default
    #[arg(long)]
    advertise: Vec<String>,
    /// Address that serves the version [default: a free port on the address that faces the manager]
    #[arg(long)]
    weights_listen: Option<SocketAddr>,
    /// tcp (in the clear), tls or quic; may be given more than once, best first [default: tcp on loopback, else tls]
    #[arg(long, value_name = "LINK")]
    weights_link: Vec<LinkKind>,
    /// Engines cannot reach this host: dial them (or a relay) instead
    #[arg(long, conflicts_with = "advertise")]
    dial_out: bool,
    /// Engines load DIR itself, after verifying it: nothing is copied. They must see it under the same path
    #[arg(long, conflicts_with_all = ["advertise", "export", "dial_out"])]
    once: bool,
    /// With --once: do not wait for the engines; the manager knows of the version when this returns
    #[arg(long, requires = "once")]
    detach: bool,
    /// Also write the version into this directory of a shared file system, for engines that cannot reach
    /// this host
    #[arg(long)]
    export: Option<PathBuf>,
    /// One of several processes that publish the version together, each from its own host or NIC: the K-th of
    /// N, with a share of DIR's tensors (see --exchange), or with all of them (--whole)
    #[arg(long, value_name = "K/N", conflicts_with = "once")]
    sender: Option<SenderOf>,
    /// This sender has all of the tensors, as the others do
    #[arg(long, requires = "sender")]
    whole: bool,
    /// A directory that all senders see: what each must know of the others' shares goes through it
    #[arg(long, value_name = "DIR", requires = "sender", conflicts_with_all = ["whole", "export"])]
    exchange: Option<PathBuf>,
    /// Give up after so many seconds
    #[arg(long, default_value_t = 3600)]
    timeout: u64,
    /// One JSON object at the end, for scripts
    #[arg(long)]
    json: bool,
}

/// The value K/N of `--sender`, K from 1.
#[derive(Clone, Copy, Debug)]
struct SenderOf(Sender);

/// Runs the command.
pub async fn run(args: Args) -> Outcome {
    if !args.dir.is_dir() {
        return Err(Failure::usage(format!("{} is not a directory", args.dir.display())));
    }
    if args.sender.is_some() && !args.whole && args.exchange.is_none() {
        let text =
            "--sender needs --exchange DIR, or --whole where every sender publishes all of it";
        return Err(Failure::usage(text.to_owned()));
    }
    let mut signals = ShutdownSignals::install().or_exit(Exit::Io)?;
    let mut config = JobConfig { epoch: args.epoch, join: true, ..JobConfig::new(&args.job) };
    config.weights.advertise = args.advertise.clone();
    config.weights.listen = args.weights_listen;
    config.weights.links = args.weights_link.clone();
    config.weights.dials = args.dial_out;
    config.weights.export = args.export.clone();
    config.weights.single = true;
    config.weights.sender = args.sender.map(|SenderOf(sender)| sender);
    // Several of these may serve versions of one job at a time, each from memory of its own.
    let scope = format!("{} {}", args.manager.manager, std::process::id());
    config.weights.shm = Shm::AutoAt { scope };
    let job = args.manager.trainer().await?.open(config).await?;
    let number = match args.number {
        Some(number) => number,
        None => job.version_at_open().await.number + 1,
    };
    // What it told goes away with it: by then all have sealed.
    let mut told = None;
    let published = match (&args.exchange, args.sender) {
        (Some(dir), Some(SenderOf(sender))) => {
            let within = Duration::from_secs(args.timeout);
            let part = job.publish_directory_part(number, &args.dir).await?;
            if !args.json {
                eprintln!("version {number}: {}", said_of_part(&part));
            }
            let exchange = Exchange::new(dir, &args.job, args.epoch, number, sender);
            told = Some(exchange.tell(part.info())?);
            let infos = tokio::select! {
                infos = exchange.gather(within) => infos?,
                signal = signals.recv() => {
                    let text = format!("{signal}: version {number} was not published");
                    return Err(Failure::new(Exit::TryAgain, text));
                }
            };
            part.seal(&infos).await?
        }
        _ if args.once => job.publish_in_place(number, &args.dir).await?,
        _ => job.publish_directory(number, &args.dir).await?,
    };
    if !args.json && told.is_none() {
        eprintln!("version {number}: {}", said_of(&published, args.once));
    }
    if args.detach {
        return detach(&published, args.json).await;
    }
    let ended = tokio::select! {
        status = follow(published, args.json) => status,
        signal = signals.recv() => {
            let text = format!("{signal}: engines that have not fetched version {number} will not get it");
            Err(Failure::new(Exit::TryAgain, text))
        }
        _ = tokio::time::sleep(Duration::from_secs(args.timeout)) => {
            let text = format!("version {number} did not settle within {} s", args.timeout);
            Err(Failure::new(Exit::TryAgain, text))
        }
    };
    let status = ended?;
    drop(told);
    job.close(false).await?;
    finish(&status, number, args.json)
}

fn said_of(published: &Published, once: bool) -> String {
    let mib = published.bytes as f64 / f64::from(1 << 20);
    match once {
        true => format!("{mib:.1} MiB, loaded from where they are"),
        false => format!("{mib:.1} MiB, snapshot in {:.0?}", published.copied_in),
    }
}

fn said_of_part(part: &Part) -> String {
    let mib = |bytes| bytes as f64 / f64::from(1 << 20);
    let (mine, all) = (mib(part.bytes), mib(part.image_bytes));
    format!(
        "{mine:.1} of {all:.1} MiB, snapshot in {:.0?}; waiting for the other senders",
        part.copied_in
    )
}

/// Waits until the manager has sealed the version: engines load it without this process.
async fn detach(published: &Published, as_json: bool) -> Outcome {
    let version = published.sealed().await?;
    let (number, epoch) = (version.number, version.epoch);
    if as_json {
        let (root, bytes) = (hex(&version.root), published.bytes);
        println!("{}", json!({"number": number, "epoch": epoch, "root": root, "bytes": bytes}));
    } else {
        eprintln!("version {number} is sealed; engines load it without this process");
    }
    Ok(Exit::Ok)
}

fn hex(root: &Root) -> String {
    root.0.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Waits until the version is settled, or a newer one took its place.
async fn follow(mut published: Published, quiet: bool) -> Result<VersionStatus, Failure> {
    let mut progress = Progress::new("engines", 0, quiet);
    loop {
        let status = published.changed().await?;
        let total = status.engines.len() as u64;
        progress.set_total(total);
        let active = status.engines.iter().filter(|on| on.stage == LoadStage::Active).count();
        progress.set(active as u64, &note(&status));
        let gone = matches!(status.state, VersionState::Superseded | VersionState::Retired);
        if status.settled || gone {
            progress.finish();
            return Ok(status);
        }
    }
}

/// Says what the engines do that have not loaded the version yet.
fn note(status: &VersionStatus) -> String {
    let open = status.engines.iter().filter(|on| on.stage != LoadStage::Active);
    let words: Vec<String> = open
        .map(|on| match status.bytes {
            0 => format!("{} {}", on.engine, on.stage),
            all => format!("{} {} {}%", on.engine, on.stage, on.bytes * 100 / all),
        })
        .collect();
    words.join(", ")
}

fn finish(status: &VersionStatus, number: u64, as_json: bool) -> Outcome {
    let failed: Vec<_> = status.engines.iter().filter(|on| !on.error.is_empty()).collect();
    if as_json {
        let engines: Vec<_> = status
            .engines
            .iter()
            .map(|on| {
                let ms = on.since.as_millis() as u64;
                json!({"engine": on.engine, "stage": on.stage, "bytes": on.bytes,
                       "since_ms": ms, "error": on.error})
            })
            .collect();
        let root = hex(&status.version.root);
        println!(
            "{}",
            json!({"number": number, "epoch": status.version.epoch, "root": root,
                   "settled": status.settled, "bytes": status.bytes, "engines": engines})
        );
    } else {
        for on in &status.engines {
            let error = if on.error.is_empty() { "" } else { ": " };
            eprintln!("  {} {} after {:.1?}{error}{}", on.engine, on.stage, on.since, on.error);
        }
        let word = if status.settled { "is active on every engine" } else { "was superseded" };
        eprintln!("version {number} {word}");
    }
    Ok(if failed.is_empty() && status.settled { Exit::Ok } else { Exit::Failed })
}

// === impl SenderOf ===

impl FromStr for SenderOf {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |part: &str| part.parse::<u32>().ok();
        let parsed = text.split_once('/').and_then(|(k, n)| Some((number(k)?, number(n)?)));
        match parsed {
            Some((k, count)) if (1..=count).contains(&k) => {
                Ok(Self(Sender { index: k - 1, count }))
            }
            _ => Err(format!("{text:?} is not K/N with K from 1 to N, such as 2/4")),
        }
    }
}
