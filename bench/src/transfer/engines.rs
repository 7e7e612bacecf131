//! Figure E: from `publish` in the trainer to active on four engines, a version with few changes against one with all
//! bytes new. A manager, four agents and four engines as their own processes, one host each, behind limited links.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use serde_json::{Value, json};
use tokio::process::{Child, Command};

use super::host::Host;
use super::lab::Lab;
use super::netns::{Net, Traffic};
use super::order::*;
use super::report::{Figure, median};
use crate::progress;

const BYTES: u64 = 512 << 20;
const ENGINES: usize = 4;
const RATE: &str = "200mbit";
const GOAL: f64 = 0.25;
/// Share of changed elements: just below 1%.
const CHANGED: f64 = 0.009;
const MANAGER: &str = "10.77.0.1:5000";
const ENGINE: &str = "127.0.0.1:30000";
const ROUNDS: u64 = 2;
const PATIENCE: Duration = Duration::from_secs(180);

/// The processes of one job on its hosts.
struct Cluster {
    trainer: Host,
    /// Manager, agents and engines; killed when dropped.
    others: Vec<Child>,
    net: Net,
}

/// Measures the figure.
pub async fn figures(lab: &Lab) -> anyhow::Result<Vec<Figure>> {
    let cluster = match Cluster::start(lab).await {
        Ok(cluster) => cluster,
        Err(error) => {
            let why = format!("{error:#}");
            return Ok(vec![Figure::absent("E.active", GOAL, "x full", why)]);
        }
    };
    let bytes = lab.size(BYTES);
    // The first version finds the engines and touches all memory, the second the other slots.
    let mut number = 0;
    let mut publish = async |changed: Option<f64>| -> anyhow::Result<Activated> {
        number += 1;
        let kind = if changed.is_some() { "delta" } else { "full" };
        progress::line(&format!("figure E: version {number}, {kind}"));
        cluster.publish(Publish { number, bytes, seed: number, changed }).await
    };
    publish(None).await?;
    let (mut full, mut delta) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        full.push(publish(None).await?);
        delta.push(publish(Some(CHANGED)).await?);
    }
    cluster.end().await?;
    let seconds = |all: &[Activated]| median(all.iter().map(|a| a.active_ms / 1e3));
    let ratio = seconds(&delta) / seconds(&full);
    let note = format!(
        "{:.2} s against {:.2} s, {:.2} % changed",
        seconds(&delta),
        seconds(&full),
        delta[0].changed_share * 100.0
    );
    let told = |all: &[Activated]| -> Vec<Value> { all.iter().map(|a| json!(a)).collect() };
    let detail = json!({
        "note": note, "bytes": bytes, "rate": RATE, "engines": ENGINES,
        "full": told(&full), "delta": told(&delta),
    });
    // A full version that did not cross the trainer's link was not sent at all.
    let crossed = full.iter().all(|a| a.trainer_link_bytes > bytes / 2);
    let figure = Figure::at_most("E.active", ratio, GOAL, "x full", detail);
    Ok(vec![if crossed { figure } else { figure.spoiled("the full version took another way") }])
}

// === impl Cluster ===

impl Cluster {
    async fn start(lab: &Lab) -> anyhow::Result<Cluster> {
        let net = Net::up(ENGINES, RATE).await?;
        let state = lab.scratch().join("e-manager");
        std::fs::create_dir_all(&state).context("making the manager's folder")?;
        let mut manager = net.command(0)?;
        manager.args(["manager", "--insecure", "--listen", MANAGER, "--state-dir"]).arg(&state);
        let mut others = vec![spawn(lab, "e-manager", manager)?];
        for at in 1..=ENGINES {
            let mut engine = net.command(at)?;
            engine.args(["engine", "--model", "synthetic", "--listen", ENGINE]);
            others.push(spawn(lab, &format!("e-engine{at}"), engine)?);
            let mut agent = net.command(at)?;
            let (url, id) = (format!("http://{MANAGER}"), format!("e{at}"));
            agent.args(["agent", "--manager", &url, "--id", &id]);
            agent.args(["--engine", &format!("sglang=http://{ENGINE}")]);
            let listen = Net::addr(at).to_string();
            // Hosts of their own would have memory of their own.
            agent.args(["--listen", &listen, "--weights-link", "tcp", "--no-sharing"]);
            let staging = lab.staging(&id);
            std::fs::create_dir_all(&staging).context("making a staging area")?;
            agent.arg("--staging").arg(&staging);
            others.push(spawn(lab, &format!("e-agent{at}"), agent)?);
        }
        let trainer = lab.start("e-trainer", net.command(0)?)?;
        let open = || Order::Open { manager: format!("http://{MANAGER}"), engines: ENGINES };
        let opened: anyhow::Result<Value> = trainer.ask(open()).await;
        opened.context("opening a job at the manager")?;
        Ok(Cluster { trainer, others, net })
    }

    async fn publish(&self, order: Publish) -> anyhow::Result<Activated> {
        let pid = self.trainer.pid().context("the trainer has ended")?;
        let before = Traffic::of(pid)?.sent_bytes;
        let publishing = self.trainer.ask(Order::PublishToEngines(order));
        let mut activated: Activated = tokio::time::timeout(PATIENCE, publishing)
            .await
            .with_context(|| format!("not active on all engines after {PATIENCE:?}"))??;
        activated.trainer_link_bytes = Traffic::of(pid)?.sent_bytes - before;
        Ok(activated)
    }

    async fn end(self) -> anyhow::Result<()> {
        self.trainer.end().await?;
        for mut process in self.others {
            process.kill().await.ok();
        }
        self.net.down().await
    }
}

fn spawn(lab: &Lab, name: &str, mut command: Command) -> anyhow::Result<Child> {
    let log: PathBuf = lab.scratch().join(format!("{name}.log"));
    let file = std::fs::File::create(&log).with_context(|| format!("making {}", log.display()))?;
    command.stdout(file.try_clone()?).stderr(file).kill_on_drop(true);
    command.spawn().with_context(|| format!("starting {name}"))
}
