//! Figure H: how long `publish` keeps the trainer, with receivers that are stopped in the middle of a transfer, or
//! throttled to 5%, against none. With receivers at work it is reported only: they share the trainer's cores.

use rustix::process::Signal;
use serde_json::json;

use super::fleet::{Feed, Fleet, RATE};
use super::lab::Lab;
use super::order::Fetched;
use super::report::{Figure, median};
use crate::progress;

const BYTES: u64 = 256 << 20;
const RECEIVERS: usize = 4;
const ROUNDS: usize = 5;
/// Rate of a throttled receiver: 5% of [`RATE`].
const THROTTLED: &str = "10mbit";
/// Publications of a round and a condition: the first takes the free slot, the second the slot of the version that is
/// being read.
const PUBLISHES: usize = 2;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Receivers {
    None,
    Stopped,
    Throttled,
    Active,
}

/// Copy times of each condition, in milliseconds.
#[derive(Default)]
struct Times {
    of: [Vec<f64>; 4],
    number: u64,
}

/// Measures the figure.
pub async fn figures(lab: &Lab) -> anyhow::Result<Vec<Figure>> {
    let fleet = match Fleet::start(lab, "h", RECEIVERS).await {
        Ok(fleet) => fleet,
        Err(error) => {
            let why = format!("{error:#}");
            let absent = |id| Figure::absent(id, 1.1, "x alone", &why);
            return Ok(["H.stopped", "H.throttled"].map(absent).to_vec());
        }
    };
    let mut times = Times::default();
    // Both slots are touched by the first two.
    for _ in 0..PUBLISHES {
        times.publish(&fleet, lab.size(BYTES)).await?;
    }
    for round in 0..ROUNDS {
        progress::line(&format!("figure H: round {}/{ROUNDS}", round + 1));
        for turn in 0..Receivers::ALL.len() {
            let receivers = Receivers::ALL[(turn + round) % Receivers::ALL.len()];
            times.condition(&fleet, receivers, lab.size(BYTES)).await?;
        }
    }
    fleet.end().await?;
    Ok(times.judge())
}

impl Times {
    async fn publish(&mut self, fleet: &Fleet<'_>, bytes: u64) -> anyhow::Result<f64> {
        self.number += 1;
        Ok(fleet.publish(self.number, bytes).await?.copied_ms)
    }

    /// Publishes while the receivers read the version before, in the state that the condition names.
    async fn condition(
        &mut self,
        fleet: &Fleet<'_>,
        receivers: Receivers,
        bytes: u64,
    ) -> anyhow::Result<()> {
        self.number += 1;
        let issued = fleet.publish(self.number, bytes).await?;
        let mut reading = Vec::new();
        let all = if receivers == Receivers::None { 0 } else { RECEIVERS };
        for at in 0..all {
            reading.push(fleet.fetch(at, &issued.version, &Feed::from_trainer()).await?);
        }
        for order in &mut reading {
            order.reaches(1).await;
        }
        receivers.set(fleet, true).await?;
        for _ in 0..PUBLISHES {
            let copied_ms = self.publish(fleet, bytes).await?;
            self.of[receivers as usize].push(copied_ms);
        }
        receivers.set(fleet, false).await?;
        // Their version is gone by now: what a fetch of it ends with does not matter here.
        for order in reading {
            order.answer::<Fetched>().await.ok();
        }
        Ok(())
    }

    fn judge(self) -> Vec<Figure> {
        let of = |r: Receivers| median(self.of[r as usize].iter().copied());
        let none = of(Receivers::None);
        let row = |id: &str, receivers: Receivers| {
            let note = format!("{:.1} ms, alone {none:.1} ms, medians", of(receivers));
            let active = of(Receivers::Active);
            let detail = json!({
                "note": note, "receivers": RECEIVERS, "rate": RATE, "throttled_to": THROTTLED,
                "copied_ms": self.of[receivers as usize], "alone_ms": self.of[0],
                "with_active_receivers": {"x_alone": active / none, "copied_ms": self.of[3]},
            });
            Figure::at_most(id, of(receivers) / none, 1.1, "x alone", detail)
        };
        vec![row("H.stopped", Receivers::Stopped), row("H.throttled", Receivers::Throttled)]
    }
}

impl Receivers {
    const ALL: [Receivers; 4] =
        [Receivers::None, Receivers::Stopped, Receivers::Throttled, Receivers::Active];

    /// Brings the receivers into the condition's state, or back.
    async fn set(self, fleet: &Fleet<'_>, on: bool) -> anyhow::Result<()> {
        for (at, receiver) in fleet.receivers.iter().enumerate() {
            match self {
                Receivers::None | Receivers::Active => {}
                Receivers::Stopped => {
                    receiver.host.signal(if on { Signal::STOP } else { Signal::CONT })?;
                }
                Receivers::Throttled => {
                    fleet.net.set_rate(at + 1, if on { THROTTLED } else { RATE }).await?;
                }
            }
        }
        Ok(())
    }
}
