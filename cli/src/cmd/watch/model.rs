//! Content of the screen: the last state, rates between looks, and the last events. Draws nothing.

use std::collections::{BTreeMap, VecDeque};
use std::time::Instant;

use anabranch_views::{Notice, StateView};
use serde_json::{Map, Value};

use crate::table::seconds;

/// Events kept for the log.
const EVENTS: usize = 200;

/// Content of the screen.
pub struct Model {
    /// Address of the manager.
    pub manager: String,
    /// The last state.
    pub state: StateView,
    /// Tokens per second, by engine.
    pub rates: BTreeMap<String, f64>,
    /// Tokens per second of all engines.
    pub rate: f64,
    /// The last events, as lines.
    pub events: VecDeque<String>,
    /// Reason why the manager cannot be reached now.
    pub trouble: Option<String>,
    looked: Option<Instant>,
}

impl Model {
    /// An empty screen.
    pub fn new(manager: &str) -> Self {
        Self {
            manager: manager.to_owned(),
            state: StateView::default(),
            rates: BTreeMap::new(),
            rate: 0.0,
            events: VecDeque::new(),
            trouble: None,
            looked: None,
        }
    }

    /// Takes a new state, and measures the rates since the last.
    pub fn look(&mut self, state: StateView) {
        let now = Instant::now();
        if let Some(before) = self.looked.replace(now) {
            self.measure(&state, (now - before).as_secs_f64().max(0.001));
        }
        self.trouble = None;
        self.state = state;
    }

    /// Takes an event. Returns the line that the log shows; `None` if it says nothing to a person.
    pub fn event(&mut self, json: &str) -> Option<String> {
        let line = describe(json)?;
        if self.events.len() == EVENTS {
            self.events.pop_front();
        }
        self.events.push_back(line.clone());
        Some(line)
    }

    /// Notes that the manager cannot be reached.
    pub fn lost(&mut self, why: &str) {
        self.trouble = Some(why.to_owned());
        self.looked = None;
    }

    /// The content in one line.
    pub fn line(&self) -> String {
        let state = &self.state;
        let serving = state.engines.iter().filter(|engine| engine.state.is_serving()).count();
        let samples = &state.samples;
        format!(
            "{}: {serving}/{} engines serve, {:.0} tokens/s, {} running, {} waiting, {} delivered, current {}{}",
            self.job(),
            state.engines.len(),
            self.rate,
            samples.running,
            samples.waiting,
            state.counters.delivered,
            state.current,
            if state.training { ", training" } else { "" }
        )
    }

    /// The job in a few words.
    pub fn job(&self) -> String {
        match &self.state.job {
            Some(job) if job.epoch > 0 => format!("job {}@{}", job.name, job.epoch),
            Some(job) => format!("job {}", job.name),
            None => "no job".to_owned(),
        }
    }

    fn measure(&mut self, state: &StateView, seconds: f64) {
        let before: BTreeMap<&str, u64> =
            self.state.engines.iter().map(|engine| (engine.id.as_str(), engine.tokens)).collect();
        let rate = |id: &str, tokens: u64| {
            let moved = before.get(id).map_or(0, |before| tokens.saturating_sub(*before));
            moved as f64 / seconds
        };
        self.rates = state
            .engines
            .iter()
            .map(|engine| (engine.id.clone(), rate(&engine.id, engine.tokens)))
            .collect();
        let made = state.counters.tokens.saturating_sub(self.state.counters.tokens);
        self.rate = made as f64 / seconds;
    }
}

/// The event as a line, such as `12.3 s  samples moved: from e1, samples 4, kept_tokens 312`.
fn describe(json: &str) -> Option<String> {
    let event: Map<String, Value> = serde_json::from_str(json).ok()?;
    if serde_json::from_str(json).is_ok_and(|notice| is_quiet(&notice)) {
        return None;
    }
    let name = event.get("event")?.as_str()?;
    let name = name.replace('_', " ");
    let at = seconds(event.get("at_ms").and_then(Value::as_u64).unwrap_or(0));
    let told = |key: &str| matches!(key, "event" | "id" | "at_ms");
    let facts: Vec<String> = event
        .iter()
        .filter(|(key, _)| !told(key))
        .filter_map(|(key, value)| Some(format!("{key} {}", plain(value)?)))
        .collect();
    Some(format!("{at:>10}  {name}: {}", facts.join(", ")))
}

/// True if an event comes many times a second, or another event says the same.
fn is_quiet(notice: &Notice) -> bool {
    use Notice::{BatchAcked, LoadStage, SamplesPlaced};
    matches!(notice, BatchAcked { .. } | LoadStage { .. } | SamplesPlaced { .. })
}

fn plain(value: &Value) -> Option<String> {
    match value {
        Value::Null => None,
        Value::String(text) if text.is_empty() => None,
        Value::String(text) => Some(text.clone()),
        Value::Object(fields) => match fields.get("number") {
            Some(number) => Some(format!("v{number}")),
            None if fields.is_empty() => None,
            None => Some(value.to_string()),
        },
        Value::Array(items) if items.is_empty() => None,
        other => Some(other.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use anabranch_proto::Version;
    use anabranch_views::{Counters, EngineState, EngineView};

    #[test]
    fn events_read_like_sentences_and_the_log_is_bounded() {
        let mut model = Model::new("m");
        let event = r#"{"event": "samples_moved", "id": 3, "at_ms": 12300, "from": "e1", "samples": 4,
                        "version": {"epoch": 0, "number": 2, "root": ""}, "why": ""}"#;
        let line = model.event(event).expect("an event");
        assert_eq!(line, "    12.3 s  samples moved: from e1, samples 4, version v2");
        assert_eq!(model.event("no json"), None);
        (0..EVENTS * 2).for_each(|_| assert!(model.event(event).is_some()));
        assert_eq!(model.events.len(), EVENTS);
    }

    #[test]
    fn rates_are_of_tokens_between_looks() {
        let mut model = Model::new("m");
        let state = |tokens: u64| StateView {
            engines: vec![EngineView {
                id: "e1".into(),
                state: EngineState::Serving { at: Version::default() },
                tokens,
                ..EngineView::default()
            }],
            counters: Counters { tokens, ..Counters::default() },
            ..StateView::default()
        };
        model.look(state(100));
        assert_eq!(model.rate, 0.0);
        model.look(state(10_000));
        assert!(model.rate > 0.0 && model.rates["e1"] > 0.0);
        assert!(model.line().starts_with("no job: 1/1 engines serve"), "{}", model.line());
    }
}
