//! The deciding core's settings: one definition for file, flags and tests.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// All times in milliseconds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CoreConfig {
    /// An agent that says nothing for so long is suspect: it gets no new work. Default 3000.
    pub lease_ms: u64,
    /// A suspect agent may come back for so long before its samples move. Default 5000: longer than
    /// a switch reboot of the network needs, shorter than a person's patience.
    pub reattach_grace_ms: u64,
    /// A running sample without a new token for so long is continued elsewhere. Default 5000.
    pub progress_ms: u64,
    /// Added to it for each sample that runs on the same engine. Default 20.
    pub progress_per_running_ms: u64,
    /// The same deadline before an attempt's first token: prefill and the engine's own queue. Default 20000.
    pub first_token_ms: u64,
    /// Added to it for each 1,000 tokens that the attempt has to prefill. Default 1000: a slow engine's prefill.
    pub first_token_ms_per_1000: u64,
    /// Siblings wait so long for their leader's first token, so that its prefix is cached. Default 1000.
    pub leader_wait_ms: u64,
    /// Prompt and answer tokens that may be admitted and not yet committed. Default 2^30.
    pub admission_tokens: u64,
    /// A load that has not ended by then is given up. Default 600000.
    pub load_deadline_ms: u64,
    /// A failed load is ordered again after this, doubled each time up to 32 times. Default 1000.
    pub load_retry_ms: u64,
    /// An engine that dies so often within `quarantine_window_ms` must stay away for a while. Default 8.
    pub quarantine_deaths: u32,
    /// Default 60000.
    pub quarantine_window_ms: u64,
    /// Default 10000.
    pub quarantine_ms: u64,
    /// Drain deadline where none was given. Default 30000.
    pub drain_ms: u64,
    /// What cannot be known twice: mixed into the keys that holders verify grants with. The driver fills it.
    #[serde(skip)]
    pub secret: [u8; 32],
}

impl Default for CoreConfig {
    fn default() -> Self {
        Self {
            lease_ms: 3_000,
            reattach_grace_ms: 5_000,
            progress_ms: 5_000,
            progress_per_running_ms: 20,
            first_token_ms: 20_000,
            first_token_ms_per_1000: 1_000,
            leader_wait_ms: 1_000,
            admission_tokens: 1 << 30,
            load_deadline_ms: 600_000,
            load_retry_ms: 1_000,
            quarantine_deaths: 8,
            quarantine_window_ms: 60_000,
            quarantine_ms: 10_000,
            drain_ms: 30_000,
            secret: [0; 32],
        }
    }
}

impl CoreConfig {
    pub(crate) fn lease(&self) -> Duration {
        Duration::from_millis(self.lease_ms)
    }

    pub(crate) fn reattach_grace(&self) -> Duration {
        Duration::from_millis(self.reattach_grace_ms)
    }

    /// A running sample that is silent for less is not looked at: the smaller of both deadlines.
    pub fn patience(&self) -> Duration {
        Duration::from_millis(self.progress_ms.min(self.first_token_ms))
    }

    /// How long one of `running` samples on an engine may be silent. `prefill`: tokens that the engine must read before
    /// the attempt's first one, 0 once that has come.
    pub(crate) fn silence(&self, running: usize, had_token: bool, prefill: u32) -> Duration {
        let base = match had_token {
            true => self.progress_ms,
            false => {
                self.first_token_ms
                    + self.first_token_ms_per_1000.saturating_mul(prefill.into()) / 1_000
            }
        };
        Duration::from_millis(base + self.progress_per_running_ms * running as u64)
    }

    /// The key that verifies grants for what `holder` serves.
    pub(crate) fn serve_key(&self, holder: &str, life: u64) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new_keyed(&self.secret);
        hasher.update(holder.as_bytes());
        hasher.update(&life.to_le_bytes());
        hasher.finalize().into()
    }
}
