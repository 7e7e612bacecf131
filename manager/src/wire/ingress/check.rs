//! Checks that need no state. Every fault names the field and what is allowed.

use std::fmt;

use anabranch_proto::limits::MAX_ID_BYTES;
use tonic::Status;

/// What was wrong, and where in the message.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{at}: {what}")]
pub(crate) struct Invalid {
    at: String,
    what: String,
}

pub(crate) fn field(at: &str, what: impl fmt::Display) -> Invalid {
    Invalid { at: at.to_owned(), what: what.to_string() }
}

impl Invalid {
    /// The same fault, seen from further out.
    pub fn inside(self, place: &str) -> Self {
        Self { at: format!("{place}: {}", self.at), what: self.what }
    }
}

impl From<Invalid> for Status {
    fn from(invalid: Invalid) -> Self {
        Status::invalid_argument(invalid.to_string())
    }
}

/// A name that people type: no space in it.
pub(crate) fn name(at: &str, text: &str) -> Result<(), Invalid> {
    word(at, text)?;
    if text.contains(char::is_whitespace) {
        return Err(field(at, format!("{text:?} has a space in it")));
    }
    Ok(())
}

/// A key: not empty, printable, short.
pub(crate) fn word(at: &str, text: &str) -> Result<(), Invalid> {
    if text.is_empty() {
        return Err(field(at, "empty"));
    }
    optional_word(at, text)
}

pub(crate) fn optional_word(at: &str, text: &str) -> Result<(), Invalid> {
    if text.len() > MAX_ID_BYTES {
        return Err(field(at, format!("{} bytes, at most {MAX_ID_BYTES} are allowed", text.len())));
    }
    if let Some(odd) = text.chars().find(|c| c.is_control()) {
        return Err(field(at, format!("has the unprintable character {odd:?}")));
    }
    Ok(())
}

pub(crate) fn words(at: &str, texts: &[String]) -> Result<(), Invalid> {
    texts.iter().try_for_each(|text| word(at, text))
}

/// Finite and inside `range`.
pub(crate) fn number(
    at: &str,
    value: f32,
    range: std::ops::RangeInclusive<f32>,
) -> Result<f32, Invalid> {
    // Not a number is inside nothing.
    if range.contains(&value) {
        return Ok(value);
    }
    Err(field(at, format!("{value} is not between {} and {}", range.start(), range.end())))
}
