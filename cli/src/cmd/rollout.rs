//! `anabranch rollout status`: the version of every engine, and how far the newest version has spread.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anabranch_proto::LoadStage;
use anabranch_runtime::Exit;
use anabranch_views::{StateView, VersionView};
use serde::Serialize;

use crate::failure::Outcome;
use crate::link::ManagerArgs;
use crate::table::{bytes, cells, seconds, table};

/// Time between two looks, over which a rate is measured.
const EVERY: Duration = Duration::from_millis(500);

/// Flags of `anabranch rollout`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// Shows the newest version on every engine: stage, bytes, rate, time left
    Status {
        #[command(flatten)]
        manager: ManagerArgs,
        /// Goes on until every engine has the newest version
        #[arg(long)]
        watch: bool,
        /// One JSON object (with --watch: one a line), for scripts
        #[arg(long)]
        json: bool,
    },
}

#[derive(Debug, Serialize)]
struct Report {
    current: String,
    newest: Option<Newest>,
    engines: Vec<Row>,
}

#[derive(Debug, Serialize)]
struct Newest {
    version: String,
    state: String,
    bytes: u64,
    settled: bool,
}

#[derive(Debug, Serialize)]
struct Row {
    engine: String,
    serves: String,
    /// Stage of the newest version.
    stage: String,
    bytes: u64,
    bytes_per_s: u64,
    left_ms: Option<u64>,
    took_ms: Option<u64>,
    /// Planned sources, by stripe.
    parents: Vec<String>,
    fetched_from: BTreeMap<String, u64>,
    error: String,
}

/// Runs the command.
pub async fn run(args: Args) -> Outcome {
    let What::Status { manager, watch, json } = args.what;
    let mut admin = manager.admin().await?;
    let mut before = (Instant::now(), admin.state().await?);
    loop {
        // A rate needs two looks; where nothing moves, one is enough.
        if watch || is_moving(&before.1) {
            tokio::time::sleep(EVERY).await;
        }
        let now = (Instant::now(), admin.state().await?);
        let report = Report::new(&now.1, &before.1, now.0 - before.0);
        show(&report, json, watch);
        if !watch || report.newest.as_ref().is_none_or(|newest| newest.settled) {
            return Ok(Exit::Ok);
        }
        before = now;
    }
}

fn is_moving(state: &StateView) -> bool {
    newest(state).is_some_and(|newest| !newest.settled)
}

fn newest(state: &StateView) -> Option<&VersionView> {
    state.versions.iter().max_by_key(|row| row.version.number)
}

fn show(report: &Report, as_json: bool, again: bool) {
    if as_json {
        println!("{}", serde_json::to_string(report).expect("a report is plain data"));
        return;
    }
    match &report.newest {
        None => println!("no version was published; engines serve their start-up weights"),
        Some(newest) => println!(
            "newest {} ({}, {}{}); current {}",
            newest.version,
            newest.state,
            bytes(newest.bytes),
            if newest.settled { ", on every engine" } else { "" },
            report.current
        ),
    }
    let head = cells(["ENGINE", "SERVES", "NEWEST", "BYTES", "RATE", "LEFT", "FROM", ""]);
    let rows: Vec<_> = std::iter::once(head).chain(report.engines.iter().map(Row::cells)).collect();
    print!("{}", table(&rows));
    if again {
        println!();
    }
}

// === impl Report ===

impl Report {
    fn new(now: &StateView, before: &StateView, between: Duration) -> Self {
        let row = newest(now);
        let engines = now.engines.iter().map(|engine| {
            let on = row.and_then(|row| row.engines.get(&engine.id));
            let old = newest(before)
                .filter(|old| row.is_some_and(|row| row.version == old.version))
                .and_then(|old| old.engines.get(&engine.id));
            let mut line = Row {
                engine: engine.id.clone(),
                serves: engine.version_text(),
                stage: on.map_or_else(|| "-".into(), |on| on.stage.to_string()),
                bytes: on.map_or(0, |on| on.bytes),
                bytes_per_s: 0,
                left_ms: None,
                took_ms: on.filter(|on| on.stage == LoadStage::Active).map(|on| on.since_sealed_ms),
                parents: on.map(|on| on.parents.clone()).unwrap_or_default(),
                fetched_from: on.map(|on| on.fetched_from.clone()).unwrap_or_default(),
                error: on
                    .map(|on| on.error.clone())
                    .filter(|error| !error.is_empty())
                    .unwrap_or_else(|| engine.load_error.clone()),
            };
            let moved = line.bytes.saturating_sub(old.map_or(0, |old| old.bytes));
            line.bytes_per_s = (moved as f64 / between.as_secs_f64().max(0.01)) as u64;
            let total = row.map_or(0, |row| row.bytes);
            if line.took_ms.is_none() && line.bytes_per_s > 0 {
                line.left_ms =
                    Some(total.saturating_sub(line.bytes).saturating_mul(1000) / line.bytes_per_s);
            }
            line
        });
        Self {
            current: now.current.to_string(),
            engines: engines.collect(),
            newest: row.map(|row| Newest {
                version: row.version.to_string(),
                state: row.state.to_string(),
                bytes: row.bytes,
                settled: row.settled,
            }),
        }
    }
}

// === impl Row ===

impl Row {
    fn cells(&self) -> Vec<String> {
        let rate = match self.bytes_per_s {
            0 => "-".to_owned(),
            rate => format!("{}/s", bytes(rate)),
        };
        let note = match self.took_ms {
            Some(ms) => format!("after {}", seconds(ms)),
            None => self.error.clone(),
        };
        vec![
            self.engine.clone(),
            self.serves.clone(),
            self.stage.clone(),
            bytes(self.bytes),
            rate,
            self.left_ms.map_or_else(|| "-".to_owned(), seconds),
            self.from(),
            note,
        ]
    }

    /// Peers that bytes came from, with their number; until bytes have come, the planned peers.
    fn from(&self) -> String {
        let gave = self.fetched_from.iter().filter(|(_, n)| **n > 0);
        let mut gave: Vec<(&String, &u64)> = gave.collect();
        gave.sort_by_key(|(_, n)| std::cmp::Reverse(**n));
        if gave.is_empty() {
            let mut parents = self.parents.clone();
            parents.dedup();
            return if parents.is_empty() { "-".to_owned() } else { parents.join(", ") };
        }
        let one = |(holder, n): (&String, &u64)| format!("{holder} {}", bytes(*n));
        gave.into_iter().map(one).collect::<Vec<_>>().join(", ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use anabranch_proto::{Version, VersionState};
    use anabranch_views::{EngineView, ProgressView};

    fn state(bytes: u64, stage: LoadStage) -> StateView {
        let version = |number| Version { number, ..Version::default() };
        let (stage, since_sealed_ms) = (stage.into(), 7);
        let on = ProgressView { stage, bytes, since_sealed_ms, ..ProgressView::default() };
        let row = |number, bytes, on: Option<(String, ProgressView)>| VersionView {
            version: version(number),
            state: VersionState::Available.into(),
            bytes,
            engines: BTreeMap::from_iter(on),
            ..VersionView::default()
        };
        let (id, serves) = ("e1".to_owned(), Some(version(2)));
        StateView {
            current: version(2),
            engines: vec![EngineView { id: id.clone(), version: serves, ..EngineView::default() }],
            versions: vec![row(2, 9, None), row(3, 1000, Some((id, on)))],
            ..StateView::default()
        }
    }

    #[test]
    fn rate_and_time_left_come_from_two_looks() {
        let report = Report::new(
            &state(600, LoadStage::Fetching),
            &state(400, LoadStage::Fetching),
            Duration::from_millis(500),
        );
        let row = &report.engines[0];
        assert_eq!((row.bytes_per_s, row.left_ms, row.took_ms), (400, Some(1000), None));
        assert_eq!(row.serves, "v2");
        assert_eq!(report.newest.map(|newest| newest.version), Some("v3".into()));
    }

    #[test]
    fn a_row_says_whom_it_is_planned_to_fetch_from_and_then_from_whom_it_did() {
        let mut state = state(600, LoadStage::Fetching);
        let on = state.versions[1].engines.get_mut("e1").expect("it loads");
        on.parents = vec!["e7".into(), "e7".into(), "e2".into()];
        let from = |state: &StateView| {
            Report::new(state, state, Duration::from_secs(1)).engines[0].cells()[6].clone()
        };
        assert_eq!(from(&state), "e7, e2");
        let on = state.versions[1].engines.get_mut("e1").expect("it loads");
        on.fetched_from =
            BTreeMap::from([("e2".into(), 512), ("e7".into(), 2048), ("trainer".into(), 0)]);
        assert_eq!(from(&state), "e7 2.0 KiB, e2 512 B");
    }

    #[test]
    fn an_active_engine_says_how_long_it_took() {
        let report = Report::new(
            &state(1000, LoadStage::Active),
            &state(900, LoadStage::Fetching),
            Duration::from_secs(1),
        );
        assert_eq!((report.engines[0].took_ms, report.engines[0].left_ms), (Some(7), None));
    }
}
