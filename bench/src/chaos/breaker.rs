//! Does to the processes what the plan says, and undoes it when its time is over. Owns what is broken at present.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anabranch_runtime::process::Signal;
use anyhow::Context;
use serde_json::json;

use super::faults::{Fault, Kind, Plan};
use crate::cluster::{Cluster, Node};
use crate::proxy::Link;
use crate::publishing::Publishing;

/// Time for an engine to answer its fault switch; one that does not is broken already.
const SWITCH: Duration = Duration::from_millis(500);
/// Time between two looks for a fetch, which takes some tens of milliseconds.
const FETCH_LOOK: Duration = Duration::from_millis(1);
/// Longest wait for a fetch.
const FETCH_WAIT: Duration = Duration::from_millis(400);
/// Time for a drained agent to leave by itself; then it is killed, so that its engine can come back.
const DRAIN_WAIT: Duration = Duration::from_secs(6);

/// The faults that were injected, and those that must still be undone.
pub struct Breaker {
    plan: Plan,
    http: reqwest::Client,
    counts: BTreeMap<&'static str, u64>,
    /// Faults that the engine did not take, because it was gone or frozen.
    missed: u64,
    kills: u64,
    torn: u64,
    last: &'static str,
    mends: Vec<Mend>,
    /// Agents to be killed while they fetch the next version.
    in_fetch: Vec<usize>,
    /// Agents that were killed while the manager saw them fetch.
    killed_fetching: u64,
}

/// A fault that must be undone at a time.
#[derive(Debug)]
struct Mend {
    due: Instant,
    at: usize,
    how: How,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum How {
    Continue,
    Link,
    Clear,
    /// Kill the drained agent, unless it has ended or was started again since.
    Drained {
        /// Number of the agent's life that was drained.
        life: u32,
    },
}

impl Breaker {
    /// Makes a breaker whose plan is seeded with `seed`.
    pub fn new(seed: u64) -> Self {
        Self {
            plan: Plan::new(seed),
            http: reqwest::Client::new(),
            counts: BTreeMap::new(),
            missed: 0,
            kills: 0,
            torn: 0,
            last: "none",
            mends: Vec::new(),
            in_fetch: Vec::new(),
            killed_fetching: 0,
        }
    }

    /// Injected faults by kind, with the misses.
    pub fn counts(&self) -> BTreeMap<&'static str, u64> {
        let mut counts = self.counts.clone();
        if self.missed > 0 {
            counts.insert("missed", self.missed);
        }
        counts
    }

    /// Number of injected faults.
    pub fn total(&self) -> u64 {
        self.counts.values().sum()
    }

    /// Number of processes that were killed as a fault.
    pub fn kills(&self) -> u64 {
        self.kills
    }

    /// Number of faults that ended all streams of an engine: kills, early ends and resets.
    pub fn torn(&self) -> u64 {
        self.torn
    }

    /// Agents that were killed while the manager saw them fetch.
    pub fn killed_fetching(&self) -> u64 {
        self.killed_fetching
    }

    /// Name of the newest fault.
    pub fn last(&self) -> &'static str {
        self.last
    }

    /// Injects the next fault of the plan.
    pub async fn strike(&mut self, cluster: &mut Cluster) -> anyhow::Result<()> {
        let whole = self.whole(cluster);
        let linked = self.linked(cluster);
        let fault =
            self.plan.next(if whole.is_empty() { &linked } else { &whole }, cluster.nodes.len());
        self.last = fault.kind.name();
        tracing::info!(kind = fault.kind.name(), engine = cluster.nodes[fault.at].id, "fault");
        let done = self.inject(cluster, fault).await?;
        match done {
            true => {
                *self.counts.entry(fault.kind.name()).or_default() += 1;
                self.kills += u64::from(fault.kind.is_kill());
                self.torn += u64::from(fault.kind.tears_streams());
            }
            false => self.missed += 1,
        }
        Ok(())
    }

    async fn inject(&mut self, cluster: &mut Cluster, fault: Fault) -> anyhow::Result<bool> {
        let at = fault.at;
        let node = &mut cluster.nodes[at];
        match fault.kind {
            Kind::EngineKill => {
                let was_up = node.engine.is_up();
                node.engine.kill().await?;
                return Ok(was_up);
            }
            Kind::AgentKill => {
                let was_up = node.agent.is_up();
                node.agent.kill().await?;
                return Ok(was_up);
            }
            Kind::AgentKillMidFetch => self.in_fetch.push(at),
            Kind::EngineStop => {
                node.engine.signal(Signal::STOP)?;
                self.mend_later(fault, How::Continue);
            }
            Kind::LinkCut | Kind::LinkStall => {
                let link = if fault.kind == Kind::LinkCut { Link::Cut } else { Link::Stall };
                node.proxy.as_ref().context("the chaos cluster has proxies")?.set(link);
                self.mend_later(fault, How::Link);
            }
            Kind::Drain => return self.drain(cluster, at).await,
            Kind::CleanEnd => return Ok(self.switch(node, json!({"kind": "end_early"})).await),
            Kind::Reset => return Ok(self.switch(node, json!({"kind": "reset"})).await),
            Kind::LostFinish => {
                return Ok(self
                    .switch(node, json!({"kind": "lose_finish", "count": fault.much}))
                    .await);
            }
            Kind::SlowEngine => {
                let done =
                    self.switch(node, json!({"kind": "slow", "factor": fault.much as f64})).await;
                self.mend_later(fault, How::Clear);
                return Ok(done);
            }
        }
        Ok(true)
    }

    /// Undoes the faults whose time is over.
    pub async fn mend_due(&mut self, cluster: &mut Cluster) -> anyhow::Result<()> {
        let now = Instant::now();
        let (due, later) =
            std::mem::take(&mut self.mends).into_iter().partition(|mend| mend.due <= now);
        self.mends = later;
        self.mend(cluster, due).await
    }

    /// Undoes all faults, so that the run can finish.
    pub async fn mend_all(&mut self, cluster: &mut Cluster) -> anyhow::Result<()> {
        self.in_fetch.clear();
        let (now, later): (Vec<Mend>, Vec<Mend>) = std::mem::take(&mut self.mends)
            .into_iter()
            .partition(|mend| !matches!(mend.how, How::Drained { .. }));
        self.mends = later;
        self.mend(cluster, now).await
    }

    /// Kills the agents that were chosen for it, as soon as they fetch; called when a version was just published.
    pub async fn kill_in_fetch(
        &mut self,
        cluster: &mut Cluster,
        publishing: &Publishing,
    ) -> anyhow::Result<()> {
        for chosen in std::mem::take(&mut self.in_fetch) {
            // Something else may have befallen it since: a victim is whole until it is hit.
            let whole = self.whole(cluster);
            let Some(at) = whole.iter().find(|&&at| at == chosen).or(whole.first()).copied() else {
                self.in_fetch.push(chosen);
                continue;
            };
            let node = &mut cluster.nodes[at];
            let started = Instant::now();
            while !publishing.is_fetching(&node.id) && started.elapsed() < FETCH_WAIT {
                tokio::time::sleep(FETCH_LOOK).await;
            }
            self.killed_fetching += u64::from(publishing.is_fetching(&node.id));
            node.agent.kill().await?;
        }
        Ok(())
    }

    async fn mend(&mut self, cluster: &mut Cluster, mends: Vec<Mend>) -> anyhow::Result<()> {
        for Mend { at, how, .. } in mends {
            let node = &mut cluster.nodes[at];
            match how {
                How::Continue => node.engine.signal(Signal::CONT)?,
                How::Link => {
                    node.proxy.as_ref().context("the chaos cluster has proxies")?.set(Link::Pass)
                }
                How::Clear => {
                    self.switch(node, json!({"kind": "clear"})).await;
                }
                How::Drained { life } if node.agent.is_up() && node.agent.lives() == life => {
                    node.agent.kill().await?
                }
                How::Drained { .. } => {}
            }
        }
        Ok(())
    }

    /// Drains an engine as a person would: `anabranch engines drain ID`.
    async fn drain(&mut self, cluster: &mut Cluster, at: usize) -> anyhow::Result<bool> {
        let (id, life) = (cluster.nodes[at].id.clone(), cluster.nodes[at].agent.lives());
        let url = cluster.url().to_owned();
        let args = ["engines", "drain", &id, "--manager", &url, "--deadline", "1"];
        cluster.run_aside(&format!("drain-{}", self.total()), &args).await?;
        self.mends.push(Mend { due: Instant::now() + DRAIN_WAIT, at, how: How::Drained { life } });
        Ok(true)
    }

    async fn switch(&self, node: &Node, body: serde_json::Value) -> bool {
        let request = self
            .http
            .post(format!("http://{}/fault", node.engine_addr))
            .json(&body)
            .timeout(SWITCH);
        request.send().await.is_ok_and(|reply| reply.status().is_success())
    }

    fn mend_later(&mut self, fault: Fault, how: How) {
        // A second fault of the same kind at the same place takes the place of the first one's end.
        self.mends.retain(|mend| (mend.at, mend.how) != (fault.at, how));
        self.mends.push(Mend { due: Instant::now() + fault.lasts, at: fault.at, how });
    }

    /// Engines that have no fault now.
    fn whole(&self, cluster: &Cluster) -> Vec<usize> {
        let up = |node: &Node| node.engine.is_up() && node.agent.is_up();
        let broken = |at: usize| self.mends.iter().any(|mend| mend.at == at);
        (0..cluster.nodes.len()).filter(|&at| up(&cluster.nodes[at]) && !broken(at)).collect()
    }

    /// Engines whose agents reach the manager. An agent that is cut off holds seconds of tokens, which a kill would
    /// lose.
    fn linked(&self, cluster: &Cluster) -> Vec<usize> {
        let cut = |at: usize| self.mends.iter().any(|mend| mend.at == at && mend.how == How::Link);
        (0..cluster.nodes.len()).filter(|&at| !cut(at)).collect()
    }
}
