//! Figure B: eight receivers behind 200 Mbit/s links, against one over the same link; and what the trainer sends.

use anabranch_proto::manifest::DEFAULT_CHUNK_BYTES;
use serde_json::{Value, json};

use super::fleet::{Arrival, Fleet, RATE};
use super::lab::Lab;
use super::report::Figure;
use crate::progress;

const BYTES: u64 = 256 << 20;
const RECEIVERS: usize = 8;
const SIMULATED: usize = 32;
/// Rate of a simulated link in bytes per second: 200 Mbit/s.
const SIM_RATE: u64 = 25_000_000;

/// Measures the figure, and simulates it for more receivers.
pub async fn figures(lab: &Lab) -> anyhow::Result<Vec<Figure>> {
    let mut rows = match measured(lab).await {
        Ok(rows) => rows,
        Err(error) => {
            let why = format!("{error:#}");
            vec![
                Figure::absent("B.last", 1.15, "x one transfer", &why),
                Figure::absent("B.egress", 1.1, "x size", &why),
            ]
        }
    };
    rows.extend(simulated());
    Ok(rows)
}

async fn measured(lab: &Lab) -> anyhow::Result<Vec<Figure>> {
    let fleet = Fleet::start(lab, "b", RECEIVERS).await?;
    let bytes = lab.size(BYTES);
    // The first version touches all memory.
    progress::line("figure B: the first version, to all");
    let first = fleet.publish(1, bytes).await?;
    let cold = last(&fleet.fan_out(&first).await?);
    let mut alone = Vec::new();
    for (number, at) in [(2, 0), (3, RECEIVERS - 1)] {
        progress::line("figure B: one transfer over the same link");
        let issued = fleet.publish(number, bytes).await?;
        alone.push(fleet.alone(at, &issued).await?.after.as_secs_f64());
    }
    let one = alone.iter().sum::<f64>() / alone.len() as f64;
    progress::line(&format!("figure B: one took {one:.2} s; now {RECEIVERS}"));
    let issued = fleet.publish(4, bytes).await?;
    let before = fleet.trainer_traffic()?.sent_bytes;
    let arrivals = fleet.fan_out(&issued).await?;
    let egress = fleet.trainer_traffic()?.sent_bytes - before;
    let chunks = fleet.trainer_usage().await?.sent_bytes.get(&4).copied().unwrap_or(0);
    fleet.end().await?;
    let size = issued.image_bytes as f64;
    let mbit = size * 8e-6 / one;
    let note = format!(
        "K = {RECEIVERS}: last {:.2} s, one alone {one:.2} s ({mbit:.0} of {RATE})",
        last(&arrivals)
    );
    let each: Vec<Value> = arrivals.iter().map(told).collect();
    let detail = json!({
        "note": note, "bytes": issued.image_bytes, "rate": RATE, "alone_s": alone,
        "first_version_last_s": cold, "receivers": each,
    });
    let egress_detail = json!({
        "note": "all that left the trainer's link, headers included",
        "link_bytes": egress, "chunk_bytes": chunks, "chunks_x_size": chunks as f64 / size,
    });
    let worst = egress.max(chunks) as f64 / size;
    Ok(vec![
        Figure::at_most("B.last", last(&arrivals) / one, 1.15, "x one transfer", detail),
        Figure::at_most("B.egress", worst, 1.1, "x size", egress_detail),
    ])
}

/// Time at which the last receiver had everything, in seconds.
fn last(arrivals: &[Arrival]) -> f64 {
    arrivals.iter().map(|a| a.after.as_secs_f64()).fold(0.0, f64::max)
}

fn told(arrival: &Arrival) -> Value {
    let Arrival { after, fetched } = arrival;
    json!({
        "after_s": after.as_secs_f64(), "received_bytes": fetched.received_bytes,
        "by_holder": fetched.bytes_by_holder, "queue": fetched.queue,
    })
}

/// Runs the manager's plan and the receivers' queues in virtual time, for more hosts than one machine can be.
fn simulated() -> [Figure; 2] {
    let run = anabranch_sim::transfer::fan_out(SIMULATED, BYTES, DEFAULT_CHUNK_BYTES, SIM_RATE);
    let note = format!("K = {SIMULATED} in virtual time, {} stripes", run.stripes);
    let detail = json!({"note": note, "run": run});
    let egress = json!({"note": note});
    [
        Figure::at_most("B.sim32", run.last_over_wire, 1.15, "x one transfer", detail),
        Figure::at_most("B.sim32.egress", run.trainer_egress, 1.1, "x size", egress),
    ]
}
