//! Silence: which running attempts have made no token for too long. Each attempt is looked at when its deadline comes,
//! not at every sweep.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use anabranch_proto::{Attempt, SampleId, SessionId};
use anabranch_runtime::clock::Now;

use super::page::Page;

/// A silent attempt is told again after this, at the earliest.
const LEAST: Duration = Duration::from_millis(1);

/// An attempt that has made no token for a while.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Silent {
    pub sample: SampleId,
    pub attempt: Attempt,
    /// When the attempt began or last made a token; later where this process was stopped meanwhile.
    pub since: Now,
    /// False before the attempt's first token.
    pub had_token: bool,
}

/// Deadlines of the attempts of one shard.
#[derive(Default)]
pub(super) struct Watch {
    due: BTreeSet<(Now, SampleId, Attempt)>,
    /// Nobody is held to have been silent before it.
    resumed: Now,
}

impl Watch {
    pub(super) fn add(&mut self, due: Now, sample: SampleId, attempt: Attempt) {
        self.due.insert((due, sample, attempt));
    }

    pub(super) fn resumed(&mut self, now: Now) {
        self.resumed = now;
    }

    fn pop_due(&mut self, now: Now) -> Option<(Now, SampleId, Attempt)> {
        let is_due = self.due.first().is_some_and(|(due, ..)| *due <= now);
        if is_due { self.due.pop_first() } else { None }
    }

    /// Looks at `looks` attempts at most whose deadline has come. Adds attempts that are silent to `silent`, and forgets those that are over.
    pub(super) fn sweep(
        &mut self,
        now: Now,
        patience: Duration,
        looks: usize,
        pages: &HashMap<SampleId, Page>,
        silent: &mut BTreeMap<SessionId, Vec<Silent>>,
    ) {
        for _ in 0..looks {
            let Some((_, sample, attempt)) = self.pop_due(now) else { return };
            let Some(page) = pages.get(&sample) else { continue };
            let Some(session) = page.runs_on(attempt) else { continue };
            let (progress, had_token) = page.progress();
            let since = progress.max(self.resumed);
            if since + patience > now {
                self.add(since + patience, sample, attempt);
                continue;
            }
            silent.entry(session).or_default().push(Silent { sample, attempt, since, had_token });
            self.add(now + (patience / 4).max(LEAST), sample, attempt);
        }
    }
}
