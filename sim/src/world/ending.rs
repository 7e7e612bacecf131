//! The end of a world: what must hold at rest, and what the world says of itself.

use std::collections::BTreeMap;

use super::{Failure, Outcome, World};

impl World {
    pub(super) fn why_it_hangs(&self) -> String {
        let state = self.core.state(self.now);
        let engines: Vec<String> = state
            .engines
            .iter()
            .filter(|e| !e.state.is_gone())
            .map(|e| format!("{} {:?} link {} running {}", e.id, e.state, e.connected, e.running))
            .collect();
        format!(
            "trainer {:?}, current {}, pending {:?}, {:?}, {:?}, {:?}, {engines:?}",
            self.trainer.phase,
            state.current,
            state.pending,
            state.queue,
            state.steps,
            state.egress
        )
    }

    pub(super) fn finish(mut self) -> Result<Outcome, Box<Failure>> {
        if self.broken.is_none() {
            let accounts = self.trainer.account(&self.admitted_n());
            let at_rest = self.core.check_at_rest().and(self.core.check_fold(&self.folded));
            let pages = self.ledger.stats().pages;
            let pages =
                if pages == 0 { Ok(()) } else { Err(format!("I7: {pages} pages are left")) };
            if let Err(what) = accounts.and(at_rest).and(pages) {
                self.fail(what);
            }
        }
        if let Some(what) = self.broken {
            let (seed, at_ms) = (self.scenario.seed, self.now.as_millis());
            return Err(Box::new(Failure { seed, at_ms, what, story: self.story.into() }));
        }
        let counters = self.core.counters();
        self.outcome.virtual_ms = self.now.as_millis();
        self.outcome.delivered = self.trainer.got.len() as u64;
        self.outcome.checked_tokens = self.trainer.checked_tokens;
        self.outcome.migrations = counters.migrations;
        self.outcome.regenerated_tokens = counters.regenerated_tokens;
        self.outcome.abandoned = counters.abandoned;
        self.outcome.digest = self.digest.finish();
        Ok(self.outcome)
    }

    fn admitted_n(&self) -> BTreeMap<String, u32> {
        let of = |key: &String| self.asked.get(key).map(|n| (key.clone(), *n));
        self.admitted.iter().filter_map(of).collect()
    }
}
