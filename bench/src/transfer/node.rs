//! One host of the transfer bench, as a process: a trainer or a receiver on the product's own API, driven by orders on
//! stdin. Owns its threads, its staging area and its answers; decides nothing. Ends with its stdin.

use std::io::{BufRead, Write};
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};

use anabranch_transfer::{
    FetchRequest, FetchRules, Fetcher, Holder, LinkKind, Listen, Listener, Published, Publisher,
    PublisherConfig, ServeLimits, Server, ShmArena, SourceRef, Staged, Staging,
};
use anyhow::Context;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::model::{self, Model};
use super::order::*;
use super::{raw, usage};

mod job;

/// Runs `anabranch bench transfer-node` until its stdin ends. Each order runs on a thread of its own; the bench waits
/// for answers, so there are only as many as it has asked for.
pub fn run() -> anyhow::Result<bool> {
    let node = Node::new();
    std::thread::scope(|scope| {
        for line in std::io::stdin().lock().lines() {
            let Ok(line) = line else { break };
            let call: Call = match serde_json::from_str(&line) {
                Ok(call) => call,
                Err(error) => {
                    say(&Reply { id: 0, is: Answer::Failed(format!("not an order: {error}")) });
                    continue;
                }
            };
            let node = &node;
            scope.spawn(move || {
                let is = match node.obey(call.id, call.order) {
                    Ok(value) => Answer::Done(value),
                    Err(error) => Answer::Failed(format!("{error:#}")),
                };
                say(&Reply { id: call.id, is });
            });
        }
        node.over.cancel();
    });
    node.end();
    Ok(true)
}

/// Prints one reply. If nobody reads, stdin is closed too, which ends the node.
#[allow(clippy::print_stdout)]
fn say(reply: &Reply) {
    let line = serde_json::to_string(reply).expect("replies are plain data");
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}").and_then(|()| out.flush()).ok();
}

struct Node {
    trainer: Mutex<Option<Trainer>>,
    receiver: Mutex<Option<Receiver>>,
    raw: raw::Receiver,
    training: tokio::sync::Mutex<Option<job::Training>>,
    runtime: tokio::runtime::Handle,
    over: CancellationToken,
}

struct Trainer {
    publisher: Arc<Publisher>,
    model: Option<Model>,
    published: Vec<Published>,
}

#[derive(Clone)]
struct Receiver {
    fetcher: Fetcher,
    /// Lends what the fetcher has fetched, for as long as the node lives.
    server: Arc<Server>,
    staging: PathBuf,
    kept: Arc<Mutex<Vec<Staged>>>,
}

impl Node {
    fn new() -> Node {
        Node {
            trainer: Mutex::default(),
            receiver: Mutex::default(),
            raw: raw::Receiver::default(),
            training: tokio::sync::Mutex::default(),
            runtime: tokio::runtime::Handle::current(),
            over: CancellationToken::new(),
        }
    }

    fn on_runtime<T>(&self, work: impl Future<Output = T>) -> T {
        self.runtime.block_on(work)
    }

    fn obey(&self, id: u64, order: Order) -> anyhow::Result<Value> {
        let value = |v: serde_json::Result<Value>| v.context("forming an answer");
        match order {
            Order::Receive(order) => value(serde_json::to_value(self.receive(order)?)),
            Order::Train(order) => value(serde_json::to_value(self.train(order)?)),
            Order::Publish(order) => value(serde_json::to_value(self.publish(&order)?)),
            Order::Fetch(order) => value(serde_json::to_value(self.fetch(id, order)?)),
            Order::Digest => {
                let receiver = self.receiver()?;
                let kept = lock(&receiver.kept);
                Ok(json!(digest_of(kept.last().context("nothing was fetched")?)))
            }
            Order::Release => {
                lock(&self.receiver()?.kept).clear();
                Ok(Value::Null)
            }
            Order::Open { manager, engines } => {
                let opened = self.on_runtime(job::Training::open(&manager, engines))?;
                *self.on_runtime(self.training.lock()) = Some(opened);
                Ok(Value::Null)
            }
            Order::PublishToEngines(order) => {
                let activated = self.on_runtime(async {
                    let mut training = self.training.lock().await;
                    let training = training.as_mut().context("this node has no job")?;
                    training.publish(&order).await
                });
                value(serde_json::to_value(activated?))
            }
            Order::Usage => value(serde_json::to_value(self.usage()?)),
            Order::Hash { bytes } => Ok(json!(self.raw.hash(bytes)?)),
            Order::RawServe { bytes } => {
                let addr = raw::serve(IpAddr::from([0, 0, 0, 0]), bytes)?;
                Ok(json!(Listening { addrs: vec![addr.to_string()] }))
            }
            Order::RawFetch { addr, bytes, streams } => {
                value(serde_json::to_value(self.raw.fetch(&addr, bytes, streams)?))
            }
        }
    }

    fn receive(&self, order: Receive) -> anyhow::Result<Listening> {
        let name = order.staging.file_name().and_then(|n| n.to_str());
        let (shm, name) = order.staging.parent().zip(name).context("staging is no path")?;
        let staging = Staging::open(shm, name)?;
        let holder = Holder::new(&order.job);
        holder.set_key(key(&order.key)?);
        // As the transfers that the figures compare with.
        let links = vec![LinkKind::Tcp];
        let listen = Listen { links, ..Listen::at(order.listen) };
        let server =
            Server::serve(Listener::bind(&listen)?, holder.clone(), ServeLimits::default())?;
        let progress = std::time::Duration::from_millis(order.progress_ms);
        let rules = FetchRules { progress, ..FetchRules::default() };
        let addrs = server.addresses().iter().map(ToString::to_string).collect();
        *lock(&self.receiver) = Some(Receiver {
            fetcher: Fetcher::new(staging, holder, rules),
            server: Arc::new(server),
            staging: order.staging,
            kept: Arc::default(),
        });
        Ok(Listening { addrs })
    }

    fn train(&self, order: Train) -> anyhow::Result<Listening> {
        let mut config = PublisherConfig::loopback(&order.job, order.epoch);
        config.listen = order.listen;
        config.links = vec![LinkKind::Tcp];
        config.hash_threads = std::thread::available_parallelism().map_or(1, usize::from).min(4);
        config.delta = order.delta;
        config.shm = order.arena.map(|dir| ShmArena { dir, required: true });
        let publisher = Publisher::start(config)?;
        publisher.set_serve_key(key(&order.key)?);
        let addrs = publisher.addresses().iter().map(ToString::to_string).collect();
        let trainer =
            Trainer { publisher: Arc::new(publisher), model: None, published: Vec::new() };
        *lock(&self.trainer) = Some(trainer);
        Ok(Listening { addrs })
    }

    fn publish(&self, order: &Publish) -> anyhow::Result<Issued> {
        let mut guard = lock(&self.trainer);
        let trainer = guard.as_mut().context("this node is no trainer")?;
        let old = trainer.model.take();
        let (model, changed_share) = Model::next(old, order.bytes, order.seed, order.changed);
        let refs = model.refs();
        let before = usage::faults()?;
        let published = trainer.publisher.publish(order.number, &refs)?.wait()?;
        let faults = usage::faults_since(before)?;
        let ms = |d: std::time::Duration| d.as_secs_f64() * 1e3;
        let issued = Issued {
            version: published.version.into(),
            image_bytes: published.bytes,
            copied_ms: ms(published.copied_in),
            sealed_ms: ms(published.sealed_in),
            delta_bytes: published.delta_bytes,
            digest: model.digest(),
            changed_share,
            faults,
        };
        trainer.published.push(published);
        trainer.model = Some(model);
        Ok(issued)
    }

    fn fetch(&self, id: u64, order: Fetch) -> anyhow::Result<Fetched> {
        let receiver = self.receiver()?;
        let version = order.version.version()?;
        let source = |s: &Source| -> anyhow::Result<SourceRef> {
            let grant = hex::decode(&s.grant).context("a grant is hex")?;
            Ok(SourceRef {
                holder: s.holder.clone(),
                addrs: vec![s.addr.parse()?],
                grant,
                stripes: s.stripes.clone(),
                fallback_for: s.fallback_for.clone(),
                origin: String::new(),
            })
        };
        let request = FetchRequest {
            version,
            sources: order.sources.iter().map(source).collect::<anyhow::Result<_>>()?,
            streams: order.streams,
            stripe_count: order.stripe_count,
            baseline: None,
            progress: Some(Arc::new(move |at| say(&Reply { id, is: Answer::Progress(at.bytes) }))),
            cancel: self.over.child_token(),
        };
        let (cpu, before) = (usage::cpu_ns(), usage::faults()?);
        let staged = receiver.fetcher.fetch_blocking(&request)?;
        let (cpu_ns, faults) = (usage::cpu_ns() - cpu, usage::faults_since(before)?);
        let report = &staged.report;
        let fetched = Fetched {
            took_ms: report.took.as_secs_f64() * 1e3,
            bytes: report.bytes,
            carried_bytes: report.carried_bytes,
            delta_bytes: report.delta_bytes,
            received_bytes: report.received_bytes,
            bytes_by_holder: report.bytes_by_holder.clone(),
            queue: Value::String(format!("{:?}", report.queue)),
            cpu_ns,
            faults,
            dir: staged.dir().to_owned(),
        };
        let mut kept = lock(&receiver.kept);
        kept.clear();
        kept.push(staged);
        Ok(fetched)
    }

    fn usage(&self) -> anyhow::Result<Usage> {
        let mut usage = usage::now()?;
        if let Some(trainer) = &*lock(&self.trainer) {
            let sent = trainer.published.iter().map(|p| (p.version.number, p.sent_bytes()));
            usage.sent_bytes.extend(sent);
        }
        if let Some(receiver) = &*lock(&self.receiver) {
            let holder = receiver.server.holder();
            let held = holder.versions().into_iter().filter_map(|v| holder.held(v));
            usage.sent_bytes.extend(held.map(|h| (h.version().number, h.sent_bytes())));
        }
        Ok(usage)
    }

    fn receiver(&self) -> anyhow::Result<Receiver> {
        lock(&self.receiver).clone().context("this node is no receiver")
    }

    /// Removes the staging area. A node that is killed leaves it, as an agent does.
    fn end(self) {
        let receiver = lock(&self.receiver).take();
        if let Some(Receiver { fetcher, server, staging, kept }) = receiver {
            drop((server, kept, fetcher));
            std::fs::remove_dir_all(staging).ok();
        }
    }
}

/// Digest of the bytes in the staged file, whatever the chunks' hashes were.
fn digest_of(staged: &Staged) -> String {
    let mut names: Vec<&str> = staged.manifest().tensors.iter().map(|t| t.name.as_str()).collect();
    names.sort_unstable();
    let one = |name| (name, staged.tensor(name).expect("the manifest names it"));
    model::digest(names.into_iter().map(one))
}

fn key(text: &str) -> anyhow::Result<[u8; 32]> {
    let mut key = [0; 32];
    hex::decode_to_slice(text, &mut key).context("a key is 64 hex digits")?;
    Ok(key)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("no holder of a node's lock panics")
}
