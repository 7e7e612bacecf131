//! The Prometheus families of one manager. Units stand in the names. Hot paths hold handles; what is
//! counted elsewhere (ledger, core) is read once a second.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::Duration;

use anabranch_proto::LoadStage;
use anabranch_runtime::Now;
use anabranch_views::{EngineView, Notice, StateView};
use metrics::{Counter, Histogram, counter, gauge, histogram, with_local_recorder};
use metrics_exporter_prometheus::{
    Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder,
};

use crate::ledger::LedgerStats;

const SECONDS: &[f64] = &[
    0.001, 0.002, 0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 60.0,
];
const SAMPLES: &[f64] = &[1.0, 4.0, 16.0, 64.0, 256.0, 1024.0, 4096.0, 16384.0, 65536.0];
const TOKENS: &[f64] = &[1e1, 1e2, 1e3, 1e4, 1e5, 1e6, 1e7, 1e8];

/// Looks come every second; a rate over less says nothing.
const SHORTEST_RATE: Duration = Duration::from_millis(200);
/// Looks at one engine come every few seconds at most; after a longer time it was away meanwhile.
const LONGEST_LOOK: Duration = Duration::from_secs(10);

/// A manager's own recorder: several managers may live in one process.
pub(crate) struct Metrics {
    recorder: PrometheusRecorder,
    handle: PrometheusHandle,
    pub families: Families,
    seen: Mutex<Seen>,
}

/// Handles for what happens often.
pub(crate) struct Families {
    /// Time from the finish of a batch's last sample to its last part in the transport's hands.
    pub delivery: Histogram,
    pub hellos_refused: Counter,
    pub bad_ticks: Counter,
    pub misbehaved: Counter,
    /// A peer did not take what it was sent.
    pub overflows: Counter,
    stopped_ms: Counter,
    tick_age: Histogram,
    tick_tokens: Histogram,
    batch_samples: Histogram,
    batch_tokens: Histogram,
    load: Histogram,
}

/// What the last look saw.
#[derive(Default)]
struct Seen {
    at: Now,
    tokens: u64,
    engines: BTreeMap<String, Time>,
    /// Engines by state: a state that nobody is in any more must be said to be empty.
    states: BTreeMap<String, u32>,
    /// Versions by which a step's oldest token was behind, of the last step done.
    step_max_lag: u64,
}

#[derive(Clone, Copy)]
struct Time {
    looked: Now,
    idle: Duration,
    serving: Duration,
}

impl Metrics {
    pub fn new() -> Self {
        let recorder = builder().build_recorder();
        let handle = recorder.handle();
        let families = with_local_recorder(&recorder, Families::new);
        Self { recorder, handle, families, seen: Mutex::default() }
    }

    pub fn render(&self) -> String {
        self.handle.render()
    }

    pub fn tick(&self, tokens: u64, held_ms: u32) {
        self.families.tick_tokens.record(tokens as f64);
        self.families.tick_age.record(f64::from(held_ms) / 1e3);
    }

    pub fn stopped(&self, gap: Duration) {
        self.families.stopped_ms.increment(gap.as_millis() as u64);
    }

    pub fn noticed(&self, notice: &Notice) {
        match notice {
            Notice::BatchOffered { samples, tokens, .. } => {
                self.families.batch_samples.record(f64::from(*samples));
                self.families.batch_tokens.record(*tokens as f64);
            }
            Notice::LoadStage { stage: LoadStage::Active, ms, .. } => {
                self.families.load.record(*ms as f64 / 1e3);
            }
            Notice::StepDone { max_lag, .. } => self.seen().step_max_lag = *max_lag,
            _ => {}
        }
    }

    /// Once a second: everything that is a state of the whole, or counted by others.
    pub fn look(&self, now: Now, state: &StateView, ledger: &LedgerStats, inbox: usize) {
        let mut seen = self.seen();
        let passed = now.since(seen.at);
        with_local_recorder(&self.recorder, || {
            ledger_counts(ledger);
            core_counts(state);
            gauge!("anabranch_inbox_depth").set(inbox as f64);
            gauge!("anabranch_step_max_lag_versions").set(seen.step_max_lag as f64);
            if passed >= SHORTEST_RATE {
                rates(&mut seen, passed, state, ledger.tokens);
            }
            by_state(&mut seen, state);
        });
        seen.at = now;
        self.handle.run_upkeep();
    }

    /// One page of engines at a time.
    pub fn look_at_engines(&self, now: Now, engines: &[EngineView]) {
        let mut seen = self.seen();
        with_local_recorder(&self.recorder, || {
            for engine in engines.iter().filter(|engine| !engine.state.is_gone()) {
                let time = seen.engines.entry(engine.id.clone()).or_insert_with(|| Time::new(now));
                of_engine(engine, time, now);
            }
        });
    }

    fn seen(&self) -> std::sync::MutexGuard<'_, Seen> {
        self.seen.lock().expect("no code panics while it holds this lock")
    }
}

impl Time {
    fn new(now: Now) -> Self {
        Self { looked: now, idle: Duration::ZERO, serving: Duration::ZERO }
    }

    /// Time since the look before this one.
    fn passed(&mut self, now: Now) -> Duration {
        let passed = now.since(self.looked);
        self.looked = now;
        if passed > LONGEST_LOOK { Duration::ZERO } else { passed }
    }
}

impl Families {
    fn new() -> Self {
        Self {
            delivery: histogram!("anabranch_delivery_seconds"),
            hellos_refused: counter!("anabranch_hellos_refused_total"),
            bad_ticks: counter!("anabranch_bad_ticks_total"),
            misbehaved: counter!("anabranch_peer_misbehaved_total"),
            overflows: counter!("anabranch_outgoing_overflows_total"),
            stopped_ms: counter!("anabranch_manager_stopped_milliseconds_total"),
            tick_age: histogram!("anabranch_tick_age_seconds"),
            tick_tokens: histogram!("anabranch_tick_tokens"),
            batch_samples: histogram!("anabranch_batch_samples"),
            batch_tokens: histogram!("anabranch_batch_tokens"),
            load: histogram!("anabranch_load_seconds"),
        }
    }
}

fn builder() -> PrometheusBuilder {
    let suffix = |text: &str| Matcher::Suffix(text.to_owned());
    PrometheusBuilder::new()
        .set_buckets_for_metric(suffix("_seconds"), SECONDS)
        .and_then(|builder| builder.set_buckets_for_metric(suffix("_samples"), SAMPLES))
        .and_then(|builder| builder.set_buckets_for_metric(suffix("_tokens"), TOKENS))
        .expect("the buckets are not empty")
}

fn ledger_counts(ledger: &LedgerStats) {
    counter!("anabranch_tokens_total").absolute(ledger.tokens);
    counter!("anabranch_repeated_tokens_total").absolute(ledger.repeated_tokens);
    counter!("anabranch_stale_tokens_total").absolute(ledger.stale_tokens);
    counter!("anabranch_past_stop_tokens_total").absolute(ledger.past_stop_tokens);
    counter!("anabranch_discarded_tokens_total").absolute(ledger.cleared_tokens);
    counter!("anabranch_migrated_tokens_total").absolute(ledger.resumed_tokens);
    counter!("anabranch_broken_segments_total").absolute(ledger.broken);
    gauge!("anabranch_ledger_pages").set(ledger.pages as f64);
}

fn core_counts(state: &StateView) {
    let counters = &state.counters;
    counter!("anabranch_finished_samples_total").absolute(counters.finished);
    counter!("anabranch_delivered_samples_total").absolute(counters.delivered);
    counter!("anabranch_committed_samples_total").absolute(counters.committed);
    counter!("anabranch_abandoned_samples_total").absolute(counters.abandoned);
    counter!("anabranch_dropped_samples_total").absolute(counters.dropped);
    counter!("anabranch_migrations_total").absolute(counters.migrations);
    counter!("anabranch_restarts_total").absolute(counters.restarts);
    counter!("anabranch_regenerated_tokens_total").absolute(counters.regenerated_tokens);
    counter!("anabranch_engine_deaths_total").absolute(counters.engine_deaths);
    for (name, count) in [
        ("waiting", state.samples.waiting),
        ("running", state.samples.running),
        ("finished", state.samples.finished),
        ("delivered", state.samples.delivered),
    ] {
        gauge!("anabranch_samples", "state" => name).set(count as f64);
    }
    gauge!("anabranch_version_current").set(state.current.number as f64);
    gauge!("anabranch_admitted_tokens").set(state.admitted_tokens as f64);
    gauge!("anabranch_retained_batches").set(state.egress.retained_batches as f64);
    gauge!("anabranch_training").set(if state.training { 1.0 } else { 0.0 });
}

fn rates(seen: &mut Seen, passed: Duration, state: &StateView, tokens: u64) {
    let rate = tokens.saturating_sub(seen.tokens) as f64 / passed.as_secs_f64();
    seen.tokens = tokens;
    let gpus = state.fleet.serving_gpus;
    gauge!("anabranch_tokens_per_second").set(rate);
    gauge!("anabranch_gpus").set(f64::from(gpus));
    // Engines without a GPU count as one each in no sense: the figure is then left out.
    if gpus > 0 {
        gauge!("anabranch_tokens_per_second_per_gpu").set(rate / f64::from(gpus));
    }
}

fn by_state(seen: &mut Seen, state: &StateView) {
    seen.states.values_mut().for_each(|count| *count = 0);
    for (name, count) in &state.fleet.states {
        seen.states.insert(name.to_string(), *count);
    }
    for (name, count) in &seen.states {
        gauge!("anabranch_engines", "state" => name.clone()).set(f64::from(*count));
    }
}

fn of_engine(engine: &EngineView, time: &mut Time, now: Now) {
    let passed = time.passed(now);
    if engine.state.is_serving() {
        time.serving += passed;
        time.idle += if engine.running == 0 { passed } else { Duration::ZERO };
    }
    let id = || engine.id.clone();
    counter!("anabranch_engine_tokens_total", "engine" => id()).absolute(engine.tokens);
    gauge!("anabranch_engine_running", "engine" => id()).set(engine.running as f64);
    gauge!("anabranch_engine_kv_used_ratio", "engine" => id()).set(f64::from(engine.kv_used));
    if !time.serving.is_zero() {
        let share = time.idle.as_secs_f64() / time.serving.as_secs_f64();
        gauge!("anabranch_engine_idle_ratio", "engine" => id()).set(share);
    }
    if let Some(version) = engine.version {
        gauge!("anabranch_engine_version", "engine" => id()).set(version.number as f64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::Core;
    use crate::core::config::CoreConfig;

    #[test]
    fn counts_and_rates_are_rendered_with_their_units() {
        let metrics = Metrics::new();
        let state = Core::new(CoreConfig::default(), Now::ZERO).state(Now::ZERO);
        let at = |tokens| LedgerStats { tokens, ..LedgerStats::default() };
        metrics.look_at_engines(Now::from_millis(1_000), &state.engines);
        metrics.look(Now::from_millis(1_000), &state, &at(100), 0);
        metrics.look(Now::from_millis(2_000), &state, &at(600), 3);
        metrics.tick(8, 20);
        let text = metrics.render();
        for line in [
            "anabranch_tokens_total 600",
            "anabranch_tokens_per_second 500",
            "anabranch_inbox_depth 3",
            "anabranch_samples{state=\"running\"} 0",
            "anabranch_tick_age_seconds_bucket{le=\"0.02\"} 1",
        ] {
            assert!(text.lines().any(|have| have == line), "{line} not in\n{text}");
        }
    }

    #[test]
    fn two_managers_in_one_process_do_not_share_counts() {
        let (one, other) = (Metrics::new(), Metrics::new());
        one.families.bad_ticks.increment(5);
        assert!(one.render().contains("anabranch_bad_ticks_total 5"));
        assert!(other.render().contains("anabranch_bad_ticks_total 0"));
    }
}
