//! Figure J: what a host pays for one version after the other, as a trainer's host, as a receiver's, and as both with
//! the memory shared: page faults on the way of an update, and all memory that the role takes.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde_json::{Value, json};

use super::lab::{LOCAL, Lab, Server};
use super::order::*;
use super::report::Figure;
use crate::progress;

const BYTES: u64 = 256 << 20;
/// Versions after the first; every other one goes as a delta.
const UPDATES: u64 = 6;
const CHANGED: f64 = 0.01;
const PAGE: u64 = 4096;
/// Page faults, as a share of the version's pages, that still count as none: threads and buffers of the process take
/// some.
const FAULTS: f64 = 0.01;
/// Memory, in bytes, that threads and buffers of a role's processes may take beside two versions.
const SLACK: u64 = 64 << 20;

/// Cost of one update on both sides.
struct Update {
    number: u64,
    trainer_faults: (u64, u64),
    receiver_faults: (u64, u64),
    trainer_bytes: u64,
    receiver_bytes: u64,
    /// Size of the files in shared memory: the trainer's, the receiver's, and both together, each file counted once.
    named_bytes: [u64; 3],
}

/// Measures the figure.
pub async fn figures(lab: &Lab) -> anyhow::Result<Vec<Figure>> {
    let bytes = lab.size(BYTES);
    let apart = watch(lab, "j", false, bytes).await?;
    let shared = watch(lab, "js", true, bytes).await?;
    let mut rows = Vec::new();
    rows.extend(role("trainer", bytes, &apart, |u| u.trainer_faults, |u| u.trainer_bytes));
    let whole = |u: &Update| u.receiver_bytes + u.named_bytes[1];
    rows.extend(role("receiver", bytes, &apart, |u| u.receiver_faults, whole));
    let faults = |u: &Update| {
        (u.trainer_faults.0 + u.receiver_faults.0, u.trainer_faults.1 + u.receiver_faults.1)
    };
    let all = |u: &Update| u.trainer_bytes + u.receiver_bytes + u.named_bytes[2];
    rows.extend(role("shared", bytes, &shared, faults, all));
    Ok(rows)
}

/// Sends versions from one trainer to one receiver on this host, by TCP or through the trainer's own memory.
async fn watch(lab: &Lab, name: &str, shared: bool, bytes: u64) -> anyhow::Result<Vec<Update>> {
    let arena = lab.staging(&format!("{name}.arena"));
    let host = lab.local(&format!("{name}-trainer"))?;
    let trainer = lab.trainer_with(host, LOCAL, true, shared.then(|| arena.clone())).await?;
    let receiver = lab.receiver(lab.local(&format!("{name}-receiver"))?, LOCAL).await?;
    let staging = lab.staging(&receiver.host.name);
    let mut updates = Vec::new();
    for number in 1..=UPDATES + 1 {
        progress::line(&format!("figure J: {} version {number}", trainer.addr));
        // The bench's own new tensors are no fault of the update: those are counted by the node.
        let changed = (number % 2 == 0).then_some(CHANGED);
        let order = Publish { number, bytes, seed: number, changed };
        let issued: Issued = trainer.host.ask(Order::Publish(order)).await?;
        let between: Usage = trainer.host.ask(Order::Usage).await?;
        let fetched = fetch(lab, &trainer, &receiver, &issued).await?;
        let [sent, got]: [Usage; 2] =
            [trainer.host.ask(Order::Usage).await?, receiver.host.ask(Order::Usage).await?];
        let serving =
            (sent.minor_faults - between.minor_faults, sent.major_faults - between.major_faults);
        let own = |u: &Usage| u.private_bytes + u.memfd_bytes.values().sum::<u64>();
        updates.push(Update {
            number,
            trainer_faults: (issued.faults.0 + serving.0, issued.faults.1 + serving.1),
            receiver_faults: fetched.faults,
            trainer_bytes: own(&sent).saturating_sub(bytes),
            receiver_bytes: own(&got),
            named_bytes: [used(&[&arena]), used(&[&staging]), used(&[&arena, &staging])],
        });
    }
    trainer.host.end().await?;
    receiver.host.end().await?;
    Ok(updates)
}

async fn fetch(
    lab: &Lab,
    trainer: &Server,
    receiver: &Server,
    issued: &Issued,
) -> anyhow::Result<Fetched> {
    let version = issued.version.clone();
    let sources = vec![lab.source(trainer, &version, &receiver.host.name, &[])?];
    let fetch = Fetch { version, sources, stripe_count: 0, streams: 4 };
    let fetched = receiver.host.ask(Order::Fetch(fetch)).await?;
    let digest: String = receiver.host.ask(Order::Digest).await?;
    anyhow::ensure!(digest == issued.digest, "the bytes that arrived are not those published");
    Ok(fetched)
}

fn role(
    name: &str,
    bytes: u64,
    updates: &[Update],
    faults: impl Fn(&Update) -> (u64, u64),
    memory: impl Fn(&Update) -> u64,
) -> [Figure; 2] {
    let pages = (bytes / PAGE) as f64;
    let after_first = updates.iter().filter(|u| u.number > 1);
    let of = |u: &Update| faults(u).0 + faults(u).1;
    let worst = after_first.clone().map(of).max().unwrap_or(0);
    let settled = after_first.filter(|u| u.number > 2).map(of).max().unwrap_or(0);
    let most = updates.iter().map(&memory).max().unwrap_or(0);
    let each: Vec<Value> = updates
        .iter()
        .map(|u| {
            let (minor, major) = faults(u);
            let kind = if u.number % 2 == 0 { "delta" } else { "full" };
            json!({"version": u.number, "kind": kind, "minor": minor, "major": major,
                   "memory_bytes": memory(u)})
        })
        .collect();
    let note = format!("{worst} faults at worst after version 1, {settled} after version 2");
    let detail = json!({"note": note, "image_pages": pages, "updates": each});
    let limit = (2 * bytes + SLACK) as f64 / bytes as f64;
    let memory_note = format!("{} MiB at most, model {} MiB", most >> 20, bytes >> 20);
    let memory_detail = json!({"note": memory_note, "limit": "2x model + 64 MiB"});
    [
        Figure::at_most(
            &format!("J.{name}.faults"),
            worst as f64 / pages,
            FAULTS,
            "x pages",
            detail,
        ),
        Figure::at_most(
            &format!("J.{name}.memory"),
            most as f64 / bytes as f64,
            limit,
            "x model",
            memory_detail,
        ),
    ]
}

/// Allocated bytes of all files below `dirs`, each counted once whatever its names are.
fn used(dirs: &[&Path]) -> u64 {
    let mut seen = BTreeMap::new();
    let mut dirs: Vec<_> = dirs.iter().map(|dir| dir.to_path_buf()).collect();
    while let Some(dir) = dirs.pop() {
        for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
            match entry.metadata() {
                Ok(meta) if meta.is_dir() => dirs.push(entry.path()),
                Ok(meta) => drop(seen.insert(meta.ino(), meta.blocks() * 512)),
                // Renamed away meanwhile: it is found under its new name.
                Err(_) => {}
            }
        }
    }
    seen.values().sum()
}
