//! Delays between retries: exponential, jittered, capped. The caller waits: by a timer in a core,
//! by a sleep in a driver.

use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};

/// Bounds of the delays. Every delay lies in `[first / 2, max]`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BackoffConfig {
    /// Upper bound of the first delay.
    pub first: Duration,
    /// Upper bound of all delays.
    pub max: Duration,
    /// Growth from one delay to the next; at least 1.
    pub factor: f32,
}

impl Default for BackoffConfig {
    /// 200 ms doubling to 10 s: a restarted manager is found again within its lease times.
    fn default() -> Self {
        BackoffConfig {
            first: Duration::from_millis(200),
            max: Duration::from_secs(10),
            factor: 2.0,
        }
    }
}

/// Reason why a [`BackoffConfig`] is refused.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
pub enum InvalidBackoff {
    /// `first` is zero.
    #[error("the first delay of a backoff must be above zero: zero would retry without pause")]
    ZeroFirst,
    /// `first` is larger than `max`.
    #[error("the first delay of a backoff, {first:?}, is above its maximum, {max:?}")]
    FirstAboveMax {
        /// Upper bound of the first delay, as given.
        first: Duration,
        /// Upper bound of all delays, as given.
        max: Duration,
    },
    /// `factor` is not a number, below 1 or above 100.
    #[error("the growth factor of a backoff must be a number from 1 to 100, not {0}")]
    Factor(f32),
}

/// An endless series of delays; [`Backoff::reset`] starts it again after a success.
#[derive(Debug)]
pub struct Backoff {
    builder: ExponentialBuilder,
    series: ExponentialBackoff,
    tries: u32,
}

impl Backoff {
    /// A series with random jitter. Fails on a `config` that would never pause or never grow.
    pub fn new(config: BackoffConfig) -> Result<Backoff, InvalidBackoff> {
        Ok(Backoff::from_builder(builder(config)?))
    }

    /// A series with jitter derived from `seed`: equal seeds give equal delays. For decision code.
    pub fn seeded(config: BackoffConfig, seed: u64) -> Result<Backoff, InvalidBackoff> {
        Ok(Backoff::from_builder(builder(config)?.with_jitter_seed(seed)))
    }

    /// The delay before the next try; each call counts one try.
    pub fn next_delay(&mut self) -> Duration {
        self.tries = self.tries.saturating_add(1);
        self.series.next().expect("the series has no maximum of tries")
    }

    /// Number of delays given since the last reset.
    pub fn tries(&self) -> u32 {
        self.tries
    }

    /// Starts the series again at `first`: call after a success.
    pub fn reset(&mut self) {
        self.series = self.builder.build();
        self.tries = 0;
    }

    fn from_builder(builder: ExponentialBuilder) -> Backoff {
        Backoff { builder, series: builder.build(), tries: 0 }
    }
}

/// Settings for backon. The crate adds up to one whole delay of jitter above its cap, so its cap is
/// half of ours.
fn builder(config: BackoffConfig) -> Result<ExponentialBuilder, InvalidBackoff> {
    let BackoffConfig { first, max, factor } = config;
    if first.is_zero() {
        return Err(InvalidBackoff::ZeroFirst);
    }
    if first > max {
        return Err(InvalidBackoff::FirstAboveMax { first, max });
    }
    if !(1.0..=100.0).contains(&factor) {
        return Err(InvalidBackoff::Factor(factor));
    }
    Ok(ExponentialBuilder::new()
        .with_min_delay(first / 2)
        .with_max_delay(max / 2)
        .with_factor(factor)
        .without_max_times()
        .with_jitter())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_grow_to_the_cap_and_never_pass_it() {
        let config = BackoffConfig::default();
        let mut backoff = Backoff::new(config).expect("valid");
        let delays: Vec<Duration> = (0..40).map(|_| backoff.next_delay()).collect();
        assert!(delays[0] >= config.first / 2 && delays[0] <= config.first);
        assert!(delays.iter().all(|d| *d <= config.max), "{delays:?}");
        assert!(delays[39] >= config.max / 2);
        assert_eq!(backoff.tries(), 40);
        backoff.reset();
        assert!(backoff.next_delay() <= config.first);
    }

    #[test]
    fn the_same_seed_gives_the_same_delays() {
        let series = |seed| -> Vec<Duration> {
            let mut b = Backoff::seeded(BackoffConfig::default(), seed).expect("valid");
            (0..8).map(|_| b.next_delay()).collect()
        };
        assert_eq!(series(3), series(3));
        assert_ne!(series(3), series(4));
    }

    #[test]
    fn nonsense_is_refused() {
        let base = BackoffConfig::default();
        let zero = BackoffConfig { first: Duration::ZERO, ..base };
        assert_eq!(Backoff::new(zero).expect_err("zero"), InvalidBackoff::ZeroFirst);
        let nan = BackoffConfig { factor: f32::NAN, ..base };
        assert!(matches!(Backoff::new(nan), Err(InvalidBackoff::Factor(_))));
        let swapped = BackoffConfig { first: base.max * 2, ..base };
        assert!(matches!(Backoff::new(swapped), Err(InvalidBackoff::FirstAboveMax { .. })));
    }
}
