//! Figure G: a receiver that comes when two others have the version takes it from them, at the link's rate, and costs
//! the trainer nothing.

use serde_json::json;

use super::fleet::{Feed, Fleet, Origin, RATE, STREAMS};
use super::lab::Lab;
use super::report::Figure;
use crate::progress;

const BYTES: u64 = 256 << 20;
const HOLDERS: usize = 2;

/// Measures the figure.
pub async fn figures(lab: &Lab) -> anyhow::Result<Vec<Figure>> {
    let fleet = match Fleet::start(lab, "g", HOLDERS + 1).await {
        Ok(fleet) => fleet,
        Err(error) => {
            let why = format!("{error:#}");
            return Ok(vec![
                Figure::absent("G.bytes", 0.0, "bytes", &why),
                Figure::absent("G.time", 1.1, "x one transfer", &why),
            ]);
        }
    };
    let issued = fleet.publish(1, lab.size(BYTES)).await?;
    // All three are new processes, so each of these touches its memory for the first time.
    let mut alone = Vec::new();
    for at in 0..HOLDERS {
        progress::line("figure G: one transfer over the same link");
        alone.push(fleet.alone(at, &issued).await?.after.as_secs_f64());
    }
    let one = alone.iter().sum::<f64>() / HOLDERS as f64;
    progress::line(&format!("figure G: one took {one:.2} s; the late one comes"));
    let sent = |usage: super::order::Usage| usage.sent_bytes.values().sum::<u64>();
    let (before, link_before) = (sent(fleet.trainer_usage().await?), fleet.trainer_traffic()?);
    let mut sources: Vec<_> = (0..HOLDERS)
        .map(|at| Origin { peer: Some(at), stripes: vec![at as u32], ..Origin::default() })
        .collect();
    sources.push(Origin::default());
    let feed = Feed { sources, stripe_count: HOLDERS as u32, streams: STREAMS };
    let late = fleet.one(HOLDERS, &issued, &feed).await?;
    let cost = sent(fleet.trainer_usage().await?) - before;
    let link_cost = fleet.trainer_traffic()?.sent_bytes - link_before.sent_bytes;
    fleet.end().await?;
    let after = late.after.as_secs_f64();
    let note = format!("late one {after:.2} s, one from the trainer {one:.2} s");
    let detail = json!({
        "note": note, "bytes": issued.image_bytes, "rate": RATE, "alone_s": alone,
        "by_holder": late.fetched.bytes_by_holder,
    });
    let cost_detail = json!({"note": "of chunks", "trainer_link_bytes": link_cost});
    Ok(vec![
        Figure::at_most("G.bytes", cost as f64, 0.0, "trainer bytes", cost_detail),
        Figure::at_most("G.time", after / one, 1.1, "x one transfer", detail),
    ])
}
