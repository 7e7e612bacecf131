//! Durations on the wire: whole milliseconds in 32 bits, where 0 often means "not set".

use std::time::Duration;

/// Whole milliseconds of `duration`; what does not fit 32 bits (49 days) becomes the largest number.
pub fn millis(duration: Duration) -> u32 {
    u32::try_from(duration.as_millis()).unwrap_or(u32::MAX)
}

/// Duration of `ms` milliseconds.
pub fn duration(ms: u32) -> Duration {
    Duration::from_millis(ms.into())
}

/// Duration of `ms` milliseconds; `None` for 0.
pub fn optional(ms: u32) -> Option<Duration> {
    (ms > 0).then(|| duration(ms))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_that_do_not_fit_are_cut_and_zero_is_none() {
        assert_eq!(millis(Duration::from_micros(1999)), 1);
        assert_eq!(millis(Duration::MAX), u32::MAX);
        assert_eq!((optional(0), optional(7)), (None, Some(Duration::from_millis(7))));
    }
}
