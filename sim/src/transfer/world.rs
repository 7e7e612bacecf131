//! The clock, and the next action of each stream: the receiver's driver (`fetch/pull` of the transfer crate) without
//! its threads.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::time::{Duration, Instant};

use anabranch_manager::weights::plan::{self, Holder, Image, Peer, Place};
use anabranch_proto::SessionId;
use anabranch_transfer::FetchRules;
use anabranch_transfer::chunks::ChunkSet;
use anabranch_transfer::queue::{Assign, ChunkQueue, StripePlan, Take};

use super::flow::{Flow, FlowId, Flows, Link};
use super::node::{Fetch, Life, Node, Stream};
use super::{FanOut, Transfer};

/// The trainer's host; receivers are numbered from 1.
const TRAINER: usize = 0;
/// Time in seconds between two looks of an idle stream at the clock, as in the driver.
const TICK: f64 = 0.05;
/// Rate at which a receiver thread verifies chunks, in bytes per second.
const HASH_RATE: f64 = 1.5e9;
/// Time in seconds after which a world is taken to hang.
const PATIENCE: f64 = 3600.0;

mod faults;

enum Happening {
    Orders(Vec<usize>),
    Greeted {
        flow: FlowId,
        attempt: u64,
    },
    Unreachable {
        flow: FlowId,
        attempt: u64,
        why: &'static str,
    },
    /// The front chunk's request is at the source, and no request is before it.
    Send {
        flow: FlowId,
        attempt: u64,
    },
    Heard {
        watcher: usize,
        source: usize,
        chunks: Range<u32>,
    },
    Look {
        host: usize,
    },
    Kill(usize),
    Cut(usize),
}

pub(super) struct World<'a> {
    transfer: &'a Transfer,
    rules: FetchRules,
    chunks: u32,
    /// Time in seconds.
    now: f64,
    epoch: Instant,
    nodes: Vec<Node>,
    flows: Flows,
    queue: BTreeMap<(u64, u64), Happening>,
    next: u64,
    out: FanOut,
    broken: Option<String>,
}

impl<'a> World<'a> {
    /// A world at time zero.
    pub fn new(transfer: &'a Transfer) -> Self {
        let chunks = transfer.bytes.div_ceil(transfer.chunk_bytes.into()) as u32;
        let rate = |host: usize| {
            let slow = transfer.slow.iter().find(|(at, _)| at + 1 == host);
            slow.map_or(transfer.rate, |(_, rate)| *rate)
        };
        let hosts = 1 + transfer.receivers + transfer.joins.len();
        let node = |host| Node::new(rate(host), chunks, host > transfer.receivers);
        let mut world = Self {
            transfer,
            rules: FetchRules::default(),
            chunks,
            now: 0.0,
            epoch: Instant::now(),
            nodes: (0..hosts).map(node).collect(),
            flows: Flows::default(),
            queue: BTreeMap::new(),
            next: 0,
            out: FanOut::default(),
            broken: None,
        };
        world.begin();
        world
    }

    fn begin(&mut self) {
        self.nodes[TRAINER].life = Life::Up;
        self.nodes[TRAINER].held = ChunkSet::full(self.chunks);
        let first = 1 + self.transfer.receivers;
        self.after(0.0, Happening::Orders((1..first).collect()));
        for (n, at) in self.transfer.joins.iter().enumerate() {
            self.after(at.as_secs_f64(), Happening::Orders(vec![first + n]));
        }
        for (at, victim) in &self.transfer.kills {
            self.after(at.as_secs_f64(), Happening::Kill(victim + 1));
        }
        for (at, victim) in &self.transfer.cuts {
            self.after(at.as_secs_f64(), Happening::Cut(victim + 1));
        }
    }

    /// Runs the world to its end. An error names the broken promise.
    pub fn run(mut self) -> Result<FanOut, String> {
        while self.broken.is_none() && !self.is_over() {
            self.step();
        }
        match self.broken {
            Some(what) => Err(format!("{:.3} s: {what}", self.now)),
            None => Ok(self.report()),
        }
    }

    fn is_over(&self) -> bool {
        let waits = |node: &Node| node.life == Life::NotYet || node.done.is_none();
        let live = |node: &&Node| matches!(node.life, Life::Up | Life::NotYet);
        !self.nodes[1..].iter().filter(live).any(waits)
    }

    fn step(&mut self) {
        self.out.events += 1;
        let due = self.queue.keys().next().map(|(at, _)| *at as f64 / 1e9);
        let through = self.flows.next_end();
        match (due, through) {
            (None, None) => return self.fail("nothing is left to happen".into()),
            (due, Some((at, id))) if due.is_none_or(|due| at <= due) => {
                self.pass(at);
                self.came(id);
            }
            (due, _) => {
                self.pass(due.expect("the flows are later"));
                let (_, happening) = self.queue.pop_first().expect("just seen");
                self.happen(happening);
            }
        }
        if self.now > PATIENCE {
            let left: Vec<usize> =
                (1..self.nodes.len()).filter(|host| self.nodes[*host].done.is_none()).collect();
            self.fail(format!("hosts {left:?} never finish"));
        }
        let link = |node: &Node| {
            let rate = if node.life == Life::Up { node.rate as f64 } else { 0.0 };
            Link { ingress: rate, egress: rate }
        };
        let links: Vec<Link> = self.nodes.iter().map(link).collect();
        self.flows.share(&links);
    }

    fn pass(&mut self, to: f64) {
        self.now = to.max(self.now);
        self.flows.advance(self.now);
    }

    fn happen(&mut self, happening: Happening) {
        match happening {
            Happening::Orders(hosts) => self.order(&hosts),
            Happening::Greeted { flow, attempt } => self.greeted(flow, attempt),
            Happening::Unreachable { flow, attempt, why } => self.lost(flow, attempt, why),
            Happening::Send { flow, attempt } => self.send(flow, attempt),
            Happening::Heard { watcher, source, chunks } => {
                if let Some(fetch) = &mut self.nodes[watcher].fetch {
                    fetch.queue.learned(source, &[chunks]);
                }
                self.pump_idle(watcher);
            }
            Happening::Look { host } => {
                self.pump_idle(host);
                if self.nodes[host].fetch.is_some() {
                    self.after(TICK, Happening::Look { host });
                }
            }
            Happening::Kill(host) => self.kill(host),
            Happening::Cut(host) => self.cut(host),
        }
    }

    // === the manager ===

    /// Tells the plan what the manager knows of all hosts, and gives its orders to `hosts`.
    fn order(&mut self, hosts: &[usize]) {
        let place = |host: usize, node: &Node| match (node.life, &node.feed) {
            _ if hosts.contains(&host) => Some(Place::Wants),
            (Life::Up, Some(_)) if node.done.is_some() => Some(Place::Complete),
            (Life::Up, Some(feed)) => Some(Place::Receiving(feed.clone())),
            _ => None,
        };
        let rate = |node: &Node| self.transfer.rates_known.then_some(node.rate);
        let peer = |host: usize, node: &Node| {
            Some(Peer {
                id: SessionId(host as u64),
                ingress: rate(node),
                egress: None,
                preemptible: false,
                relay: false,
                serves: true,
                host: None,
                at: place(host, node)?,
            })
        };
        let peers: Vec<Peer> =
            self.nodes.iter().enumerate().skip(1).filter_map(|(h, n)| peer(h, n)).collect();
        let (bytes, chunk_bytes) = (self.transfer.bytes, self.transfer.chunk_bytes.into());
        let image = Image { bytes, chunk_bytes, at_trainer: true, trainer_dials: false };
        let feeds = plan::plan(image, &peers);
        for (SessionId(host), feed) in feeds {
            self.fetch(host as usize, feed);
        }
    }

    // === a receiver ===

    fn fetch(&mut self, host: usize, feed: plan::Feed) {
        let (now, instant, rules) = (self.now, self.instant(), self.rules.queue());
        let node = &mut self.nodes[host];
        let at = |holder: Holder| holder.peer().map_or(TRAINER, |SessionId(peer)| peer as usize);
        let stripes = StripePlan {
            stripe_count: feed.parents.len() as u32,
            stripes: feed.sources.iter().map(|source| source.stripes.clone()).collect(),
            fallbacks: feed.sources.iter().map(|source| source.fallback_for.clone()).collect(),
            origins: Vec::new(),
        };
        let sources: Vec<usize> = feed.sources.iter().map(|source| at(source.holder)).collect();
        let streams = (feed.streams as usize).max(feed.parents.len());
        let ahead = (self.chunks as usize / (100 * streams)).max(2);
        node.fetch = Some(Fetch {
            queue: ChunkQueue::new(rules, &node.held, sources.len(), &stripes, instant),
            sources,
            streams: (0..streams).map(|stream| (stream, Stream::Idle)).collect(),
            window: ahead.min(self.rules.window as usize),
        });
        self.out.stripes = self.out.stripes.max(feed.parents.len());
        (node.life, node.joined, node.feed) = (Life::Up, now, Some(feed));
        self.after(0.0, Happening::Look { host });
    }

    fn pump_idle(&mut self, host: usize) {
        let Some(fetch) = &self.nodes[host].fetch else { return };
        let idle = |stream: &Stream| match stream {
            Stream::Idle => true,
            Stream::Greeting { .. } => false,
            Stream::Bound { asked, .. } => asked.is_empty(),
        };
        let streams: Vec<usize> =
            fetch.streams.iter().filter(|(_, s)| idle(s)).map(|(id, _)| *id).collect();
        for stream in streams {
            self.pump((host, stream));
        }
    }

    /// Does what the driver's thread of this stream would do: asks for chunks while it may, or for a source.
    fn pump(&mut self, flow: FlowId) {
        let instant = self.instant();
        let (host, stream) = flow;
        loop {
            let Some(fetch) = &mut self.nodes[host].fetch else { return };
            let Some(state) = fetch.streams.get_mut(&stream) else { return };
            match state {
                Stream::Greeting { .. } => return,
                Stream::Idle => match fetch.queue.assign(stream, instant) {
                    Assign::To(source) => return self.greet(flow, source),
                    Assign::Wait(_) => return,
                    Assign::Done => return self.complete(host),
                    Assign::None => {
                        let why = format!("host {host} has no source left");
                        return self.fail(why);
                    }
                },
                Stream::Bound { source, asked, attempt } => {
                    if asked.len() >= fetch.window {
                        return;
                    }
                    match fetch.queue.take(stream, instant) {
                        Take::Chunk(chunk) => {
                            asked.push_back(chunk);
                            if asked.len() == 1 {
                                let (attempt, wait) = (*attempt, self.latency());
                                self.after(wait, Happening::Send { flow, attempt });
                            }
                        }
                        Take::Done => return self.complete(host),
                        _ if !asked.is_empty() => return,
                        Take::Wait if fetch.queue.is_dropped(*source) => self.leave(flow),
                        Take::Wait => return,
                        Take::Leave => self.leave(flow),
                        Take::Rescue(slow) => {
                            self.drop_stream((host, slow), "rescued");
                            return;
                        }
                    }
                }
            }
        }
    }

    fn leave(&mut self, (host, stream): FlowId) {
        let Some(fetch) = &mut self.nodes[host].fetch else { return };
        fetch.queue.release(stream);
        fetch.streams.insert(stream, Stream::Idle);
    }

    fn greet(&mut self, flow: FlowId, source: usize) {
        let attempt = self.fresh();
        let Some(fetch) = &mut self.nodes[flow.0].fetch else { return };
        let at = fetch.sources[source];
        fetch.streams.insert(flow.1, Stream::Greeting { source, attempt });
        let (wait, happening) = match self.nodes[at].life {
            Life::Up => (4.0 * self.latency(), Happening::Greeted { flow, attempt }),
            Life::Dead => {
                let why = "connection refused";
                (2.0 * self.latency(), Happening::Unreachable { flow, attempt, why })
            }
            Life::Cut | Life::NotYet => {
                let why = "no answer";
                let wait = self.rules.connect.as_secs_f64();
                (wait, Happening::Unreachable { flow, attempt, why })
            }
        };
        self.after(wait, happening);
    }

    fn greeted(&mut self, flow: FlowId, attempt: u64) {
        let (host, stream) = flow;
        let Some(fetch) = &mut self.nodes[host].fetch else { return };
        let Some(state) = fetch.streams.get_mut(&stream) else { return };
        let &mut Stream::Greeting { source, attempt: current } = state else { return };
        if current != attempt {
            return;
        }
        *state = Stream::Bound { source, asked: VecDeque::new(), attempt };
        let at = fetch.sources[source];
        if self.nodes[at].held.is_full() {
            fetch_of(&mut self.nodes, host).queue.learned_all(source);
        } else if self.nodes[at].watchers.insert((host, source)) {
            for chunks in self.nodes[at].held.ranges() {
                self.after(self.latency(), Happening::Heard { watcher: host, source, chunks });
            }
        }
        self.pump(flow);
    }

    fn send(&mut self, flow: FlowId, attempt: u64) {
        let (host, stream) = flow;
        let Some(fetch) = &self.nodes[host].fetch else { return };
        let Some(Stream::Bound { source, asked, attempt: current }) = fetch.streams.get(&stream)
        else {
            return;
        };
        let (Some(&chunk), at) = (asked.front(), fetch.sources[*source]) else { return };
        if *current != attempt {
            return;
        }
        if !self.nodes[at].held.contains(chunk) {
            return self.fail(format!("host {at} was asked for chunk {chunk}, which it has not"));
        }
        self.flows.start(flow, at, chunk, self.chunk_len(chunk));
        if self.nodes[at].life != Life::Up {
            self.give_up_later(flow, attempt);
        }
    }

    /// Takes a chunk that has arrived.
    fn came(&mut self, flow: FlowId) {
        let (host, stream) = flow;
        let Some(Flow { from, chunk, .. }) = self.flows.end(flow) else { return };
        let (instant, len) = (self.instant(), self.chunk_len(chunk));
        self.count(host, from, len as f64);
        let node = &mut self.nodes[host];
        let Some(fetch) = &mut node.fetch else { return };
        let ours = fetch.queue.verified(stream, chunk, instant);
        let twice = ours && !node.held.insert(chunk);
        let next = match fetch.streams.get_mut(&stream) {
            Some(Stream::Bound { asked, attempt, .. }) => {
                asked.pop_front();
                (!asked.is_empty()).then_some(*attempt)
            }
            _ => None,
        };
        if twice {
            self.fail(format!("host {host} verified chunk {chunk} twice"));
        }
        if let Some(attempt) = next {
            self.send(flow, attempt);
        }
        let heard = self.latency() + len as f64 / HASH_RATE;
        let watchers: Vec<_> = self.nodes[host].watchers.iter().copied().collect();
        for (watcher, source) in watchers {
            self.after(heard, Happening::Heard { watcher, source, chunks: chunk..chunk + 1 });
        }
        self.pump(flow);
        self.pump_idle(host);
    }

    fn complete(&mut self, host: usize) {
        let now = self.now;
        let node = &mut self.nodes[host];
        let Some(fetch) = node.fetch.take_if(|fetch| fetch.queue.is_done()) else { return };
        node.done = Some(now);
        if !node.held.is_full() {
            let missing = self.chunks - self.nodes[host].held.count();
            self.fail(format!("host {host} calls itself done and lacks {missing} chunks"));
        }
        for stream in fetch.streams.keys() {
            self.flows.end((host, *stream));
        }
    }

    // === books ===

    fn count(&mut self, host: usize, from: usize, bytes: f64) {
        self.nodes[host].received += bytes;
        if from == TRAINER {
            self.out.trainer_egress += bytes;
            if self.nodes[host].late {
                self.out.trainer_to_joiners += bytes;
            }
        }
    }

    fn report(mut self) -> FanOut {
        let bytes = self.transfer.bytes as f64;
        let wire = bytes / self.transfer.rate as f64;
        let live = || self.nodes[1..].iter().filter(|node| node.life == Life::Up);
        let took = |node: &Node| (node.done.unwrap_or(self.now) - node.joined) / wire;
        let most = |of: f64, next: f64| of.max(next);
        self.out.receivers = self.transfer.receivers;
        self.out.wire_ms = wire * 1e3;
        self.out.last_over_wire = live().filter(|node| !node.late).map(took).fold(0.0, most);
        self.out.joiner_over_wire = live().filter(|node| node.late).map(took).fold(0.0, most);
        self.out.took_over_wire = self.nodes[1..].iter().map(took).collect();
        self.out.again = live().map(|node| node.received / bytes - 1.0).fold(0.0, most);
        self.out.trainer_egress /= bytes;
        self.out.trainer_to_joiners /= bytes;
        self.out
    }

    fn chunk_len(&self, chunk: u32) -> u64 {
        let size = u64::from(self.transfer.chunk_bytes);
        (self.transfer.bytes - u64::from(chunk) * size).min(size)
    }

    fn latency(&self) -> f64 {
        self.transfer.latency.as_secs_f64()
    }

    fn instant(&self) -> Instant {
        self.epoch + Duration::from_secs_f64(self.now)
    }

    fn after(&mut self, wait: f64, happening: Happening) {
        let at = ((self.now + wait) * 1e9).ceil() as u64;
        let seq = self.fresh();
        self.queue.insert((at, seq), happening);
    }

    fn fresh(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    fn fail(&mut self, what: String) {
        self.broken.get_or_insert(what);
    }
}

fn fetch_of(nodes: &mut [Node], host: usize) -> &mut Fetch {
    nodes[host].fetch.as_mut().expect("its stream was just greeted")
}
