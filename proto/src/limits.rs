//! Bounds of the wire and of the vocabulary, each with its unit and its reason, and the functions that
//! check the plain ones. Both ends of a stream call the same function.

use std::fmt;

use crate::invalid::{Fault, Invalid};

/// Largest message on an agent stream, in bytes. A big prompt is cut into frames of this size, so it
/// delays what follows by one frame at most.
pub const FRAME_BYTES: usize = 256 << 10;

/// Largest message that a stream accepts, in bytes: one frame or part with ample room for its envelope.
pub const MAX_MESSAGE_BYTES: usize = 4 << 20;

/// Largest `Submit` message, in bytes: a prompt group of 10 MB must pass.
pub const MAX_SUBMIT_BYTES: usize = 64 << 20;

/// Aimed size of a part of a micro-batch, in bytes.
pub const PART_BYTES: usize = 1 << 20;

/// Most samples of one group.
pub const MAX_GROUP_SAMPLES: u32 = 4096;

/// Most tokens of one prompt. Its column, 32 MiB, leaves room in a `Submit` message.
pub const MAX_PROMPT_TOKENS: usize = MAX_SUBMIT_BYTES / 2 / crate::tokens::WIDTH;

/// Most bytes of a group's `meta`. The manager keeps it, and sends it back with every trajectory.
pub const MAX_META_BYTES: usize = 1 << 20;

/// Most bytes of an id (a key, an engine id, a job name): short, printable words.
pub const MAX_ID_BYTES: usize = 200;

/// Most stop ids of one group, beside the model's own EOS ids.
pub const MAX_STOP_IDS: usize = 1024;

/// Most stop strings of one group.
pub const MAX_STOP_STRINGS: usize = 64;

/// Most bytes of one stop string.
pub const MAX_STOP_STRING_BYTES: usize = 1024;

/// Highest `top_k`. SGLang writes "all tokens" as this number, and keeps it in a signed 32-bit column.
pub const MAX_TOP_K: u32 = 1 << 30;

/// Sampling temperatures; 0 takes the likeliest token.
pub const TEMPERATURE: Range = Range::closed(0.0, 100.0);

/// Shares for `top_p`; 1 is off, and 0 would leave no token.
pub const TOP_P: Range = Range::above(0.0, 1.0);

/// Shares for `min_p`; 0 is off.
pub const MIN_P: Range = Range::closed(0.0, 1.0);

/// Presence and frequency penalties; 0 is off. SGLang and vLLM take the same range.
pub const PENALTY: Range = Range::closed(-2.0, 2.0);

/// Repetition penalties; 1 is off. SGLang refuses what is above 2.
pub const REPETITION_PENALTY: Range = Range::above(0.0, 2.0);

/// Most shards of a job's stream of trajectories.
pub const MAX_SHARDS: u32 = 65_536;

/// Most processes that publish one version together; more are a mistake.
pub const MAX_SENDERS: u32 = 1024;

const _: () = assert!(FRAME_BYTES < MAX_MESSAGE_BYTES && PART_BYTES < MAX_MESSAGE_BYTES);
const _: () = assert!(MAX_PROMPT_TOKENS * crate::tokens::WIDTH + MAX_META_BYTES < MAX_SUBMIT_BYTES);

/// A range of fractional numbers, with its upper end included.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Range {
    low: f32,
    includes_low: bool,
    high: f32,
}

// === impl Range ===

impl Range {
    /// Numbers from `low` to `high`, both included.
    pub const fn closed(low: f32, high: f32) -> Self {
        Self { low, includes_low: true, high }
    }

    /// Numbers above `low`, up to `high` included.
    pub const fn above(low: f32, high: f32) -> Self {
        Self { low, includes_low: false, high }
    }

    /// True if `value` is a number inside the range.
    pub fn contains(self, value: f32) -> bool {
        (value > self.low || self.includes_low && value == self.low) && value <= self.high
    }

    /// Refuses a `value` of `field` that is outside the range, infinite or not a number.
    pub fn check(self, field: &str, value: f32, remedy: &'static str) -> Result<(), Invalid> {
        if self.contains(value) {
            return Ok(());
        }
        Err(Invalid::new(field, Fault::Range { value, range: self, remedy }))
    }
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.includes_low {
            true => write!(f, "between {} and {}", self.low, self.high),
            false => write!(f, "above {} and at most {}", self.low, self.high),
        }
    }
}

// === checks of plain fields ===

/// Refuses a number of samples that is not between 1 and [`MAX_GROUP_SAMPLES`].
pub fn check_group_samples(n: u32) -> Result<(), Invalid> {
    check_count("n", n.into(), 1, MAX_GROUP_SAMPLES.into(), "")
}

/// Refuses a prompt without a token, or with more than [`MAX_PROMPT_TOKENS`].
pub fn check_prompt_tokens(tokens: usize) -> Result<(), Invalid> {
    if tokens == 0 {
        let remedy = "a prompt has at least one token".into();
        return Err(Invalid::new("prompt", Fault::Empty { remedy }));
    }
    check_len("prompt", tokens, MAX_PROMPT_TOKENS, "tokens", "shorten it")
}

/// Refuses a prompt's column that is not whole token ids, and what [`check_prompt_tokens`] refuses.
pub fn check_prompt(column: &[u8]) -> Result<(), Invalid> {
    let width = crate::tokens::WIDTH;
    if !crate::tokens::is_column(column) {
        let what = format!("{} bytes are not whole token ids of {width} bytes", column.len());
        return Err(Invalid::rule("prompt", what));
    }
    check_prompt_tokens(column.len() / width)
}

/// Refuses a `meta` of more than [`MAX_META_BYTES`].
pub fn check_meta(bytes: usize) -> Result<(), Invalid> {
    let remedy = "keep it at the trainer, and put its key here";
    check_len("meta", bytes, MAX_META_BYTES, "bytes", remedy)
}

/// Refuses a `field` of more than `most` units.
pub fn check_len(
    field: &str,
    have: usize,
    most: usize,
    unit: &'static str,
    remedy: &'static str,
) -> Result<(), Invalid> {
    if have <= most {
        return Ok(());
    }
    Err(Invalid::new(field, Fault::TooLong { have, most, unit, remedy }))
}

/// Refuses a `value` of `field` outside `low..=high`.
pub fn check_count(
    field: &str,
    value: u64,
    low: u64,
    high: u64,
    remedy: &'static str,
) -> Result<(), Invalid> {
    if (low..=high).contains(&value) {
        return Ok(());
    }
    Err(Invalid::new(field, Fault::Count { value, low, high, remedy }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ends_of_every_range_are_where_they_are_documented() {
        let tiny = f32::MIN_POSITIVE;
        for (range, inside, outside) in [
            (TEMPERATURE, [0.0, 100.0], [-tiny, 100.1]),
            (TOP_P, [tiny, 1.0], [0.0, 1.1]),
            (MIN_P, [0.0, 1.0], [-0.1, f32::INFINITY]),
            (PENALTY, [-2.0, 2.0], [-2.1, 2.1]),
            (REPETITION_PENALTY, [tiny, 2.0], [0.0, 2.1]),
        ] {
            assert_eq!(inside.map(|value| range.contains(value)), [true; 2], "{range}");
            assert_eq!(outside.map(|value| range.contains(value)), [false; 2], "{range}");
            assert!(range.check("x", f32::NAN, "").is_err(), "{range}");
        }
    }

    #[test]
    fn every_bound_of_a_group_is_refused_with_its_number() {
        let column = |tokens: usize| vec![0; tokens * crate::tokens::WIDTH];
        assert!(check_prompt(&column(MAX_PROMPT_TOKENS)).is_ok());
        assert!(
            (check_meta(MAX_META_BYTES), check_group_samples(MAX_GROUP_SAMPLES))
                == (Ok(()), Ok(()))
        );
        for (refused, says) in [
            (check_prompt(&[]), "prompt: empty; a prompt has at least one token"),
            (check_prompt(&[1; 7]), "prompt: 7 bytes are not whole token ids of 4 bytes"),
            (
                check_prompt(&column(MAX_PROMPT_TOKENS + 1)),
                "prompt: 8388609 tokens, at most 8388608 are allowed; shorten it",
            ),
            (
                check_meta(MAX_META_BYTES + 1),
                "meta: 1048577 bytes, at most 1048576 are allowed; \
                 keep it at the trainer, and put its key here",
            ),
            (check_group_samples(0), "n: 0 is not between 1 and 4096"),
            (check_group_samples(4097), "n: 4097 is not between 1 and 4096"),
        ] {
            assert_eq!(refused.expect_err(says).to_string(), says);
        }
    }
}
