//! Tally: engines by state and by version, and the GPUs that serve, counted as sessions move.

use std::collections::BTreeMap;

use anabranch_proto::Version;

use super::engine::Engine;
use super::state::EngineState;

/// Counts over all sessions that are shown.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Tally {
    states: BTreeMap<&'static str, u32>,
    /// Engines by the version of their weights, with or without a link; relays do not count.
    versions: BTreeMap<Version, u32>,
    serving_gpus: u32,
}

impl Tally {
    pub fn of<'a>(engines: impl Iterator<Item = &'a Engine>) -> Self {
        let mut tally = Self::default();
        engines.for_each(|engine| tally.enter(engine));
        tally
    }

    pub fn enter(&mut self, engine: &Engine) {
        *self.states.entry(engine.state.name()).or_default() += 1;
        if let Some(version) = of_tokens(engine) {
            *self.versions.entry(version).or_default() += 1;
        }
        self.serving_gpus += serving_gpus(engine);
    }

    /// Undoes [`Self::enter`]: the engine must be as it was then.
    pub fn leave(&mut self, engine: &Engine) {
        take_one(&mut self.states, &engine.state.name());
        if let Some(version) = of_tokens(engine) {
            take_one(&mut self.versions, &version);
        }
        self.serving_gpus -= serving_gpus(engine);
    }

    /// Engines by the name of their state.
    pub fn states(&self) -> &BTreeMap<&'static str, u32> {
        &self.states
    }

    pub fn versions(&self) -> impl Iterator<Item = Version> {
        self.versions.keys().copied()
    }

    pub fn serving_gpus(&self) -> u32 {
        self.serving_gpus
    }
}

/// Version of which the engine may make tokens; a relay makes none.
fn of_tokens(engine: &Engine) -> Option<Version> {
    engine.version().filter(|_| !engine.is_relay())
}

fn serving_gpus(engine: &Engine) -> u32 {
    match engine.state {
        EngineState::Serving { .. } => engine.hello.gpus,
        _ => 0,
    }
}

fn take_one<K: Ord>(counts: &mut BTreeMap<K, u32>, key: &K) {
    if let Some(count) = counts.get_mut(key) {
        *count -= 1;
        if *count == 0 {
            counts.remove(key);
        }
    }
}
