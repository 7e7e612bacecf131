//! One trainer and K receivers behind limited links, and the plan of who fetches from whom. Owns the hosts of one
//! figure; what happens to them is the figure's business.

use std::time::{Duration, Instant};

use anabranch_manager::weights::plan::{self, Holder, Image, Peer, Place};
use anabranch_proto::SessionId;
use anabranch_proto::manifest::DEFAULT_CHUNK_BYTES;
use anyhow::Context;

use super::host::Pending;
use super::lab::{Lab, Server};
use super::netns::{Net, Traffic};
use super::order::*;

/// Rate of every link, in the words of `tc`.
pub const RATE: &str = "200mbit";
/// Parallel streams of a transfer without a plan.
pub const STREAMS: usize = 4;

/// The hosts of one figure.
pub struct Fleet<'a> {
    lab: &'a Lab,
    /// Links between the hosts.
    pub net: Net,
    figure: String,
    /// The trainer, host 0.
    pub trainer: Server,
    /// The receivers; receiver `i` is host `i + 1`.
    pub receivers: Vec<Server>,
}

/// Result of one receiver's fetch.
pub struct Arrival {
    /// Time from the start of the fan-out until the receiver had everything.
    pub after: Duration,
    /// The receiver's own report.
    pub fetched: Fetched,
}

impl<'a> Fleet<'a> {
    /// Starts the links, the trainer and the receivers.
    pub async fn start(lab: &'a Lab, figure: &str, receivers: usize) -> anyhow::Result<Fleet<'a>> {
        let net = Net::up(receivers, RATE).await?;
        let trainer = train(lab, &net, figure).await?;
        let mut fleet =
            Fleet { lab, net, figure: figure.to_owned(), trainer, receivers: Vec::new() };
        for at in 0..receivers {
            let receiver = fleet.receiver(at).await?;
            fleet.receivers.push(receiver);
        }
        Ok(fleet)
    }

    async fn receiver(&self, at: usize) -> anyhow::Result<Server> {
        let name = format!("{}-r{at}", self.figure);
        let host = self.lab.start(&name, self.net.command(at + 1)?)?;
        self.lab.receiver(host, Net::addr(at + 1)).await
    }

    /// Starts a receiver that was killed again.
    pub async fn restart(&mut self, at: usize) -> anyhow::Result<()> {
        self.receivers[at] = self.receiver(at).await?;
        Ok(())
    }

    /// Starts the trainer again; it publishes the same bytes again.
    pub async fn restart_trainer(&mut self, issued: &Issued, bytes: u64) -> anyhow::Result<()> {
        self.trainer = train(self.lab, &self.net, &self.figure).await?;
        let again = self.publish(issued.version.number, bytes).await?;
        anyhow::ensure!(again.version == issued.version, "the same bytes got another root");
        Ok(())
    }

    /// Makes and publishes version `number` with `bytes` bytes.
    pub async fn publish(&self, number: u64, bytes: u64) -> anyhow::Result<Issued> {
        let order = Publish { number, bytes, seed: number, changed: None };
        self.trainer.host.ask(Order::Publish(order)).await
    }

    /// Lets receiver `at` fetch a version by `feed`.
    pub async fn fetch(
        &self,
        at: usize,
        version: &VersionId,
        feed: &Feed,
    ) -> anyhow::Result<Pending> {
        let name = &self.receivers[at].host.name;
        let source = |from: &Origin| {
            let holder = from.peer.map_or(&self.trainer, |peer| &self.receivers[peer]);
            let source = self.lab.source(holder, version, name, &from.stripes)?;
            anyhow::Ok(Source { fallback_for: from.fallback_for.clone(), ..source })
        };
        let sources = feed.sources.iter().map(source).collect::<anyhow::Result<_>>()?;
        let fetch = Fetch {
            version: version.clone(),
            sources,
            stripe_count: feed.stripe_count,
            streams: feed.streams,
        };
        self.receivers[at].host.send(Order::Fetch(fetch)).await
    }

    /// Fetches to one receiver, straight from the trainer, to see what the link can carry.
    pub async fn alone(&self, at: usize, issued: &Issued) -> anyhow::Result<Arrival> {
        self.one(at, issued, &Feed::from_trainer()).await
    }

    /// Fetches to one receiver by `feed`.
    pub async fn one(&self, at: usize, issued: &Issued, feed: &Feed) -> anyhow::Result<Arrival> {
        let started = Instant::now();
        let pending = self.fetch(at, &issued.version, feed).await?;
        let arrival = Arrival::of(started.elapsed(), pending.answer().await?);
        self.check(at, issued).await?;
        Ok(arrival)
    }

    /// Fetches to all receivers at once, by the manager's plan.
    pub async fn fan_out(&self, issued: &Issued) -> anyhow::Result<Vec<Arrival>> {
        let started = Instant::now();
        let mut pending = Vec::new();
        for (at, feed) in planned(self.receivers.len(), 0, issued.image_bytes).iter().enumerate() {
            let order = self.fetch(at, &issued.version, feed).await?;
            pending.push((started.elapsed(), order));
        }
        let mut arrivals = Vec::new();
        for (asked, order) in pending {
            arrivals.push(Arrival::of(asked, order.answer().await?));
        }
        for at in 0..self.receivers.len() {
            self.check(at, issued).await?;
        }
        Ok(arrivals)
    }

    /// Fails unless receiver `at` holds what was published, byte for byte.
    pub async fn check(&self, at: usize, issued: &Issued) -> anyhow::Result<()> {
        let host = &self.receivers[at].host;
        let digest: String = host.ask(Order::Digest).await?;
        anyhow::ensure!(digest == issued.digest, "{} holds other bytes than published", host.name);
        Ok(())
    }

    /// Bytes that passed the trainer's link so far.
    pub fn trainer_traffic(&self) -> anyhow::Result<Traffic> {
        Traffic::of(self.trainer.host.pid().context("the trainer has ended")?)
    }

    /// Counters of the trainer's process.
    pub async fn trainer_usage(&self) -> anyhow::Result<Usage> {
        self.trainer.host.ask(Order::Usage).await
    }

    /// Ends the hosts and the links.
    pub async fn end(self) -> anyhow::Result<()> {
        for receiver in self.receivers {
            receiver.host.end().await?;
        }
        self.trainer.host.end().await?;
        self.net.down().await
    }
}

// === impl Arrival ===

impl Arrival {
    /// The arrival of a receiver that was asked at `asked`, by its own clock.
    pub fn of(asked: Duration, fetched: Fetched) -> Arrival {
        Arrival { after: asked + Duration::from_secs_f64(fetched.took_ms / 1e3), fetched }
    }
}

/// Sources of one receiver, as a plan assigns them.
#[derive(Clone, Debug, Default)]
pub struct Feed {
    /// The sources.
    pub sources: Vec<Origin>,
    /// Stripes that the image is cut into; 0 without a plan.
    pub stripe_count: u32,
    /// Parallel streams.
    pub streams: usize,
}

/// One source of a receiver.
#[derive(Clone, Debug, Default)]
pub struct Origin {
    /// Index of the receiver that is the source; the trainer if `None`.
    pub peer: Option<usize>,
    /// Stripes that the source serves.
    pub stripes: Vec<u32>,
    /// Stripes for which the source may stand in.
    pub fallback_for: Vec<u32>,
}

impl Feed {
    /// The feed without a plan: everything from the trainer.
    pub fn from_trainer() -> Feed {
        Feed { sources: vec![Origin::default()], stripe_count: 0, streams: STREAMS }
    }
}

/// Feeds by the manager's plan, of `relays` that pass on what they get and then of `leaves` that do not.
pub fn planned(relays: usize, leaves: usize, bytes: u64) -> Vec<Feed> {
    let image = Image {
        bytes,
        chunk_bytes: DEFAULT_CHUNK_BYTES.into(),
        at_trainer: true,
        trainer_dials: false,
    };
    let peer = |at: usize| Peer {
        id: SessionId(at as u64),
        ingress: None,
        egress: None,
        preemptible: false,
        serves: at < relays,
        relay: false,
        host: None,
        at: Place::Wants,
    };
    let peers: Vec<Peer> = (0..relays + leaves).map(peer).collect();
    let place = |holder: Holder| holder.peer().map(|id| id.0 as usize);
    let from = |s: plan::Source| Origin {
        peer: place(s.holder),
        stripes: s.stripes,
        fallback_for: s.fallback_for,
    };
    let feeds = plan::plan(image, &peers).into_values().map(|feed| Feed {
        stripe_count: feed.parents.len() as u32,
        streams: feed.streams as usize,
        sources: feed.sources.into_iter().map(from).collect(),
    });
    feeds.collect()
}

async fn train(lab: &Lab, net: &Net, figure: &str) -> anyhow::Result<Server> {
    let host = lab.start(&format!("{figure}-trainer"), net.command(0)?)?;
    lab.trainer(host, Net::addr(0), false).await
}
