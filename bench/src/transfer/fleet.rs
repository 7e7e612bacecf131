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

pub const RATE: &str = "200mbit";
/// Parallel streams of a transfer that goes by no plan.
pub const STREAMS: usize = 4;

pub struct Fleet<'a> {
    lab: &'a Lab,
    pub net: Net,
    figure: String,
    pub trainer: Server,
    /// Receiver `i` is host `i + 1`.
    pub receivers: Vec<Server>,
}

/// One receiver's part in a fan-out.
pub struct Arrival {
    pub after: Duration,
    pub fetched: Fetched,
}

impl<'a> Fleet<'a> {
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

    /// Another life of a receiver that was killed.
    pub async fn restart(&mut self, at: usize) -> anyhow::Result<()> {
        self.receivers[at] = self.receiver(at).await?;
        Ok(())
    }

    /// Another life of the trainer: it publishes the same bytes again.
    pub async fn restart_trainer(&mut self, issued: &Issued, bytes: u64) -> anyhow::Result<()> {
        self.trainer = train(self.lab, &self.net, &self.figure).await?;
        let again = self.publish(issued.version.number, bytes).await?;
        anyhow::ensure!(again.version == issued.version, "the same bytes got another root");
        Ok(())
    }

    pub async fn publish(&self, number: u64, bytes: u64) -> anyhow::Result<Issued> {
        let order = Publish { number, bytes, seed: number, changed: None };
        self.trainer.host.ask(Order::Publish(order)).await
    }

    /// Lets receiver `at` fetch by `feed`.
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

    /// One receiver alone, straight from the trainer: what the link gives.
    pub async fn alone(&self, at: usize, issued: &Issued) -> anyhow::Result<Arrival> {
        self.one(at, issued, &Feed::from_trainer()).await
    }

    pub async fn one(&self, at: usize, issued: &Issued, feed: &Feed) -> anyhow::Result<Arrival> {
        let started = Instant::now();
        let pending = self.fetch(at, &issued.version, feed).await?;
        let arrival = Arrival::of(started.elapsed(), pending.answer().await?);
        self.check(at, issued).await?;
        Ok(arrival)
    }

    /// All receivers at once, by plan.
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

    /// What lies at receiver `at` is what was published, byte for byte.
    pub async fn check(&self, at: usize, issued: &Issued) -> anyhow::Result<()> {
        let host = &self.receivers[at].host;
        let digest: String = host.ask(Order::Digest).await?;
        anyhow::ensure!(digest == issued.digest, "{} holds other bytes than published", host.name);
        Ok(())
    }

    /// What passed the trainer's link so far.
    pub fn trainer_traffic(&self) -> anyhow::Result<Traffic> {
        Traffic::of(self.trainer.host.pid().context("the trainer has ended")?)
    }

    pub async fn trainer_usage(&self) -> anyhow::Result<Usage> {
        self.trainer.host.ask(Order::Usage).await
    }

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
    /// Arrival by the receiver's own clock, counted from when it was asked.
    pub fn of(asked: Duration, fetched: Fetched) -> Arrival {
        Arrival { after: asked + Duration::from_secs_f64(fetched.took_ms / 1e3), fetched }
    }
}

/// Sources of one receiver.
#[derive(Clone, Debug, Default)]
pub struct Feed {
    pub sources: Vec<Origin>,
    pub stripe_count: u32,
    pub streams: usize,
}

#[derive(Clone, Debug, Default)]
pub struct Origin {
    /// `None`: the trainer.
    pub peer: Option<usize>,
    pub stripes: Vec<u32>,
    pub fallback_for: Vec<u32>,
}

impl Feed {
    pub fn from_trainer() -> Feed {
        Feed { sources: vec![Origin::default()], stripe_count: 0, streams: STREAMS }
    }
}

/// As the manager would have it: `relays` that pass on what they get, then `leaves` that do not.
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
