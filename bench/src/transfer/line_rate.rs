//! Figure A: one verified transfer over loopback against bare `sendfile` and `recv` in the same run, wall and CPU.

use std::process::Stdio;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::process::Command;

use super::lab::{LOCAL, Lab, Server};
use super::machine;
use super::order::*;
use super::report::{Figure, median};
use crate::progress;

const BYTES: u64 = 2 << 30;
const STREAMS: usize = 4;
const ROUNDS: usize = 5;

/// Memory that the figure needs, as a multiple of the version: two versions in the arena, one in the staging area, one
/// raw arena, the model while it is made.
const MEMORY_FACTOR: u64 = 5;

struct Round {
    ours_ms: f64,
    raw_ms: f64,
    ours_cpu_ns: f64,
    raw_cpu_ns: f64,
    hash_cpu_ns: f64,
}

/// Measures the figure.
pub async fn figures(lab: &Lab) -> anyhow::Result<Vec<Figure>> {
    let bytes = lab.size(BYTES);
    let (need, have) = (MEMORY_FACTOR * bytes, machine::available_bytes());
    if need > have {
        let why = format!("needs {need} bytes of memory, {have} are free");
        return Ok(vec![
            Figure::absent("A.wall", 0.7, "x", &why),
            Figure::absent("A.cpu", 1.15, "x", &why),
        ]);
    }
    let trainer = lab.trainer(lab.local("a-trainer")?, LOCAL, false).await?;
    let receiver = lab.receiver(lab.local("a-receiver")?, LOCAL).await?;
    let versions = [publish(&trainer, 1, bytes).await?, publish(&trainer, 2, bytes).await?];
    let Listening { addrs } = trainer.host.ask(Order::RawServe { bytes }).await?;
    let mut rounds = Vec::new();
    for nth in 0..=ROUNDS {
        progress::line(&format!("figure A: round {nth}/{ROUNDS}"));
        let issued = &versions[nth % 2];
        let round = round(lab, &trainer, &receiver, issued, &addrs[0], nth % 2 == 0).await?;
        // The first one touches all memory.
        if nth > 0 {
            rounds.push(round);
        }
    }
    trainer.host.end().await?;
    receiver.host.end().await?;
    Ok(judge(bytes, &rounds, iperf().await))
}

async fn publish(trainer: &Server, number: u64, bytes: u64) -> anyhow::Result<Issued> {
    progress::line(&format!("figure A: makes {} MiB of weights", bytes >> 20));
    trainer.host.ask(Order::Publish(Publish { number, bytes, seed: number, changed: None })).await
}

/// Makes one transfer of each kind, in an order that changes.
async fn round(
    lab: &Lab,
    trainer: &Server,
    receiver: &Server,
    issued: &Issued,
    raw_addr: &str,
    raw_first: bool,
) -> anyhow::Result<Round> {
    let raw = || {
        let (addr, bytes) = (raw_addr.replace("0.0.0.0", "127.0.0.1"), issued.image_bytes);
        receiver.host.ask::<RawFetched>(Order::RawFetch { addr, bytes, streams: STREAMS })
    };
    let early = if raw_first { Some(raw().await?) } else { None };
    receiver.host.ask::<Value>(Order::Release).await?;
    let version = issued.version.clone();
    let sources = vec![lab.source(trainer, &version, "a-receiver", &[])?];
    let fetch = Fetch { version, sources, stripe_count: 0, streams: STREAMS };
    let ours: Fetched = receiver.host.ask(Order::Fetch(fetch)).await?;
    let digest: String = receiver.host.ask(Order::Digest).await?;
    anyhow::ensure!(digest == issued.digest, "the bytes that arrived are not those published");
    anyhow::ensure!(ours.received_bytes >= issued.image_bytes, "chunks were here already");
    let raw = match early {
        Some(raw) => raw,
        None => raw().await?,
    };
    let hash_cpu_ns: u64 = receiver.host.ask(Order::Hash { bytes: issued.image_bytes }).await?;
    Ok(Round {
        ours_ms: ours.took_ms,
        raw_ms: raw.took_ms,
        ours_cpu_ns: ours.cpu_ns as f64,
        raw_cpu_ns: raw.cpu_ns as f64,
        hash_cpu_ns: hash_cpu_ns as f64,
    })
}

fn judge(bytes: u64, rounds: &[Round], iperf: Value) -> Vec<Figure> {
    let median = |of: fn(&Round) -> f64| median(rounds.iter().map(of));
    let speed = median(|r| r.raw_ms / r.ours_ms);
    let cpu = median(|r| (r.ours_cpu_ns - r.raw_cpu_ns) / r.hash_cpu_ns);
    let gbps = |ms: f64| bytes as f64 / ms / 1e6;
    let each: Vec<Value> = rounds
        .iter()
        .map(|r| {
            json!({
                "ours_ms": r.ours_ms, "raw_ms": r.raw_ms, "ours_cpu_ms": r.ours_cpu_ns / 1e6,
                "raw_cpu_ms": r.raw_cpu_ns / 1e6, "blake3_cpu_ms": r.hash_cpu_ns / 1e6,
            })
        })
        .collect();
    let (ours, raw) = (gbps(median(|r| r.ours_ms)), gbps(median(|r| r.raw_ms)));
    let detail = json!({
        "note": format!("{ours:.2} GB/s verified, {raw:.2} GB/s raw, medians of {} rounds", rounds.len()),
        "bytes": bytes, "streams": STREAMS, "rounds": each, "iperf3": iperf,
    });
    let seconds = |of: fn(&Round) -> f64| median(of) / 1e9;
    let note = format!(
        "receiver CPU {:.2} s, raw {:.2} s, BLAKE3 {:.2} s",
        seconds(|r| r.ours_cpu_ns),
        seconds(|r| r.raw_cpu_ns),
        seconds(|r| r.hash_cpu_ns)
    );
    let what = "(receiver's CPU - raw receiver's CPU) / CPU of BLAKE3 over the same bytes";
    vec![
        Figure::at_least("A.wall", speed, 0.7, "x raw speed", detail),
        Figure::at_most("A.cpu", cpu, 1.15, "x BLAKE3", json!({"note": note, "what": what})),
    ]
}

/// Rate of `iperf3` with as many streams, if it is installed; only shown.
async fn iperf() -> Value {
    if !machine::has("iperf3") {
        return Value::from("not installed");
    }
    const PORT: &str = "52017";
    let mut server = Command::new("iperf3");
    server
        .args(["-s", "-1", "-B", "127.0.0.1", "-p", PORT])
        .stdout(Stdio::null())
        .kill_on_drop(true);
    let Ok(_server) = server.spawn() else { return Value::from("does not start") };
    for _ in 0..50 {
        let mut client = Command::new("iperf3");
        client.args(["-c", "127.0.0.1", "-p", PORT, "-t", "3", "-J", "-P", &STREAMS.to_string()]);
        let Ok(output) = client.output().await else { break };
        let told: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        if let Some(bits) = told["end"]["sum_received"]["bits_per_second"].as_f64() {
            return json!({"gb_per_s": bits / 8e9, "streams": STREAMS});
        }
        // It does not listen yet.
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    Value::from("gave no figure")
}
