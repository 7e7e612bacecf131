//! Figure F: a source, a relay and a receiver that nobody depends on are killed, or lose their link, at 10, 50 and
//! 90%. The figure is the share of bytes that came again, and how much later the others had everything.
//!
//! The manager's plan says who fetches from whom: three relays in chains, and a receiver at their ends that serves
//! nobody.

use std::time::Duration;

use anyhow::Context;
use serde_json::json;

use super::fleet::{Fleet, RATE, planned};
use super::lab::{Lab, PROGRESS};
use super::netns::Traffic;
use super::report::Figure;
use crate::progress;

mod course;

use course::Course;

/// Size of a version: 5.8 s on the wire, so eighteen cases take less than four minutes.
const BYTES: u64 = 128 << 20;
const RELAYS: usize = 3;
const RECEIVERS: usize = RELAYS + 1;
const PERCENT: [u64; 3] = [10, 50, 90];
/// Largest share of a version that a fault may bring a second time.
const AGAIN: f64 = 0.02;
/// Longest time with a fault, as a multiple of the time without.
const FINISH: f64 = 1.25;
const GIVE_UP: Duration = Duration::from_secs(90);

#[derive(Clone, Copy, PartialEq, Eq)]
enum Victim {
    Source,
    Relay,
    Receiver,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// SIGKILL, and an immediate restart.
    Kill,
    /// The cable is pulled until the others are done; that of the only source, for as long as the progress deadline.
    Link,
}

/// Result of one transfer to all receivers.
struct Run {
    after: Vec<Duration>,
    /// All bytes that came over the receiver's link.
    arrived_bytes: Vec<u64>,
    /// Time without any source.
    sourceless: Duration,
    errors: Vec<String>,
}

/// Measures the figure.
pub async fn figures(lab: &Lab) -> anyhow::Result<Vec<Figure>> {
    let rows = Victim::ALL.iter().flat_map(|v| Fault::ALL.map(|f| (*v, f)));
    let mut fleet = match Fleet::start(lab, "f", RECEIVERS).await {
        Ok(fleet) => fleet,
        Err(error) => {
            let why = format!("{error:#}");
            let absent = |(v, f)| {
                let [again, finish] = ids(v, f);
                [
                    Figure::absent(&again, AGAIN, "x size", &why),
                    Figure::absent(&finish, FINISH, "x undisturbed", &why),
                ]
            };
            return Ok(rows.flat_map(absent).collect());
        }
    };
    let (bytes, mut number) = (lab.size(BYTES), 0);
    let mut undisturbed = None;
    // The first one touches all memory.
    for _ in 0..2 {
        number += 1;
        progress::line("figure F: undisturbed");
        undisturbed = Some(run(&mut fleet, number, bytes, None).await?);
    }
    let undisturbed = undisturbed.context("it ran")?;
    let mut figures = Vec::new();
    for (victim, fault) in rows {
        let mut cases = Vec::new();
        for percent in PERCENT {
            number += 1;
            let name = format!("{} of the {} at {percent}%", fault.name(), victim.name());
            progress::line(&format!("figure F: {name}"));
            let case = run(&mut fleet, number, bytes, Some((victim, fault, percent))).await;
            cases.push((percent, case.with_context(|| name)?));
        }
        figures.extend(judge(victim, fault, bytes, &undisturbed, &cases));
    }
    fleet.end().await?;
    Ok(figures)
}

/// Sends one version to all receivers, with at most one fault on the way, and checks that every receiver has the right
/// bytes in the end.
async fn run(
    fleet: &mut Fleet<'_>,
    number: u64,
    bytes: u64,
    fault: Option<(Victim, Fault, u64)>,
) -> anyhow::Result<Run> {
    let issued = fleet.publish(number, bytes).await?;
    let feeds = planned(RELAYS, RECEIVERS - RELAYS, issued.image_bytes);
    let before = arrived(fleet)?;
    let mut course = Course::start(fleet, &issued, feeds).await?;
    if let Some((victim, fault, percent)) = fault {
        let watched = victim.watched();
        course.pending[watched].1.reaches(issued.image_bytes * percent / 100).await;
        course.strike(fleet, victim, fault, bytes).await?;
    }
    let spared = match fault {
        Some((victim, Fault::Link, _)) => victim.receiver(),
        _ => None,
    };
    course.finish(fleet, |at| Some(at) != spared).await?;
    if let Some(at) = spared {
        fleet.net.set_link(at + 1, true).await?;
        course.finish(fleet, |other| other == at).await?;
    }
    for at in 0..RECEIVERS {
        fleet.check(at, &issued).await?;
    }
    let arrived_bytes = arrived(fleet)?.iter().zip(before).map(|(a, b)| a - b).collect();
    let Course { after, sourceless, errors, .. } = course;
    let after = after.into_iter().map(|a| a.unwrap_or(GIVE_UP)).collect();
    Ok(Run { after, arrived_bytes, sourceless, errors })
}

fn judge(
    victim: Victim,
    fault: Fault,
    bytes: u64,
    undisturbed: &Run,
    cases: &[(u64, Run)],
) -> [Figure; 2] {
    let (mut again, mut finish) = (0f64, 0f64);
    let mut told = Vec::new();
    for (percent, case) in cases {
        let more = |at: usize| case.arrived_bytes[at] as f64 - undisturbed.arrived_bytes[at] as f64;
        let most_again = (0..RECEIVERS).map(more).fold(0.0, f64::max) / bytes as f64;
        let others = (0..RECEIVERS).filter(|at| Some(*at) != victim.receiver());
        let last = others.map(|at| case.after[at]).max().unwrap_or_default();
        let allowed = match fault {
            Fault::Kill => case.sourceless,
            Fault::Link => PROGRESS.max(case.sourceless),
        };
        let ratio = last.saturating_sub(allowed).as_secs_f64() / undisturbed.last().as_secs_f64();
        (again, finish) = (again.max(most_again), finish.max(ratio));
        told.push(json!({
            "at_percent": percent, "again_x_size": most_again, "others_s": last.as_secs_f64(),
            "allowed_s": allowed.as_secs_f64(), "all_s": case.last().as_secs_f64(), "errors": case.errors,
        }));
    }
    let [again_id, finish_id] = ids(victim, fault);
    let note =
        format!("worst of {PERCENT:?} %; undisturbed {:.2} s", undisturbed.last().as_secs_f64());
    let what = "arrived over any receiver's link beyond what arrives undisturbed / size";
    let setup = json!({"what": what, "bytes": bytes, "rate": RATE, "cases": told, "note": note});
    let how = "others' last finish, less what is allowed (without a source; the progress deadline of a dead link)";
    [
        Figure::at_most(&again_id, again, AGAIN, "x size", setup),
        Figure::at_most(
            &finish_id,
            finish,
            FINISH,
            "x undisturbed",
            json!({"note": note, "what": how}),
        ),
    ]
}

fn ids(victim: Victim, fault: Fault) -> [String; 2] {
    let name = format!("F.{}.{}", fault.name(), victim.name());
    [format!("{name}.again"), format!("{name}.finish")]
}

fn arrived(fleet: &Fleet<'_>) -> anyhow::Result<Vec<u64>> {
    let one =
        |pid: Option<u32>| Ok(Traffic::of(pid.context("a receiver has ended")?)?.received_bytes);
    fleet.receivers.iter().map(|r| one(r.host.pid())).collect()
}

impl Run {
    fn last(&self) -> Duration {
        self.after.iter().copied().max().unwrap_or_default()
    }
}

impl Victim {
    const ALL: [Victim; 3] = [Victim::Source, Victim::Relay, Victim::Receiver];

    fn name(self) -> &'static str {
        match self {
            Victim::Source => "source",
            Victim::Relay => "relay",
            Victim::Receiver => "receiver",
        }
    }

    /// Index of the victim among the receivers; `None` for the trainer.
    fn receiver(self) -> Option<usize> {
        match self {
            Victim::Source => None,
            Victim::Relay => Some(1),
            Victim::Receiver => Some(RECEIVERS - 1),
        }
    }

    /// Index of the receiver whose progress decides when to strike.
    fn watched(self) -> usize {
        self.receiver().unwrap_or(1)
    }
}

impl Fault {
    const ALL: [Fault; 2] = [Fault::Kill, Fault::Link];

    fn name(self) -> &'static str {
        match self {
            Fault::Kill => "kill",
            Fault::Link => "link",
        }
    }
}
