//! The one error of this vocabulary: a field whose value cannot be taken. It names the field, what was
//! found there, what is allowed, and what to do about it.

use std::borrow::Cow;
use std::fmt;

use crate::limits::Range;

/// A field of a message or of a setting that has a value outside its bounds.
///
/// Conversions from protobuf and the `check` functions of this crate return it. The manager answers it to
/// its caller; the trainer's SDK returns it before anything is sent.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{field}: {fault}")]
pub struct Invalid {
    /// Path of the field as the caller knows it, such as `sampling: top_p`.
    pub field: String,
    /// The broken rule.
    pub fault: Fault,
}

/// Rules that a field can break.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Fault {
    /// A required field was not set.
    #[error("missing; {remedy}")]
    Missing {
        /// Advice for the caller.
        remedy: Cow<'static, str>,
    },
    /// A text, list or prompt has nothing in it.
    #[error("empty; {remedy}")]
    Empty {
        /// Advice for the caller.
        remedy: Cow<'static, str>,
    },
    /// A fractional number is outside its range, or not a number.
    #[error("{value} is not {range}{}", Hint(.remedy))]
    Range {
        /// Value that was found.
        value: f32,
        /// Values that are allowed.
        range: Range,
        /// Advice for the caller; may be empty.
        remedy: &'static str,
    },
    /// A whole number is outside its range.
    #[error("{value} is not between {low} and {high}{}", Hint(.remedy))]
    Count {
        /// Value that was found.
        value: u64,
        /// Lowest allowed value.
        low: u64,
        /// Highest allowed value.
        high: u64,
        /// Advice for the caller; may be empty.
        remedy: &'static str,
    },
    /// A text, list or blob is longer than allowed.
    #[error("{have} {unit}, at most {most} are allowed{}", Hint(.remedy))]
    TooLong {
        /// Length that was found.
        have: usize,
        /// Highest allowed length.
        most: usize,
        /// Unit of both lengths, in the plural.
        unit: &'static str,
        /// Advice for the caller; may be empty.
        remedy: &'static str,
    },
    /// A word or a code of the wire that this build does not know.
    #[error("{value} is unknown: {allowed}")]
    Unknown {
        /// Word or code that was found.
        value: String,
        /// Known words, such as `raw, tempered or processed`.
        allowed: String,
    },
    /// Any other rule, in words: what is wrong, and what to do.
    #[error("{0}")]
    Rule(String),
}

/// Writes `; remedy`, or nothing without one.
struct Hint<'a>(&'a str);

// === impl Invalid ===

impl Invalid {
    /// A field that breaks `fault`.
    pub fn new(field: impl Into<String>, fault: Fault) -> Self {
        Self { field: field.into(), fault }
    }

    /// A field that breaks a rule of its own. `what` says what is wrong and what to do.
    pub fn rule(field: impl Into<String>, what: impl fmt::Display) -> Self {
        Self::new(field, Fault::Rule(what.to_string()))
    }

    /// A required field that was not set.
    pub fn missing(field: impl Into<String>, remedy: impl Into<Cow<'static, str>>) -> Self {
        Self::new(field, Fault::Missing { remedy: remedy.into() })
    }

    /// A word or code that is none of `allowed`.
    pub fn unknown(
        field: impl Into<String>,
        value: impl fmt::Display,
        allowed: &[&'static str],
    ) -> Self {
        Self::new(field, Fault::Unknown { value: value.to_string(), allowed: one_of(allowed) })
    }

    /// The same fault, with the field named from further out: `place: field`.
    pub fn inside(mut self, place: &str) -> Self {
        self.field = format!("{place}: {}", self.field);
        self
    }

    /// The same fault of a field that the caller knows under another name.
    pub fn named(mut self, field: impl Into<String>) -> Self {
        self.field = field.into();
        self
    }
}

/// Lists words for a person: `raw, tempered or processed`.
fn one_of(words: &[&'static str]) -> String {
    match words {
        [] => String::new(),
        [only] => (*only).to_owned(),
        [head @ .., last] => format!("{} or {last}", head.join(", ")),
    }
}

/// The gRPC answer to a message with an invalid field: `INVALID_ARGUMENT`, which no retry helps.
impl From<Invalid> for tonic::Status {
    fn from(invalid: Invalid) -> Self {
        tonic::Status::invalid_argument(invalid.to_string())
    }
}

// === impl Hint ===

impl fmt::Display for Hint<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            "" => Ok(()),
            remedy => write!(f, "; {remedy}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_names_field_value_bound_and_remedy() {
        let too_hot =
            Fault::Range { value: 3.0, range: Range::closed(0.0, 2.0), remedy: "0 is off" };
        let error = Invalid::new("penalty", too_hot).inside("sampling");
        assert_eq!(error.to_string(), "sampling: penalty: 3 is not between 0 and 2; 0 is off");
        let words = Invalid::unknown("mode", "warm", &["raw", "tempered", "processed"]);
        assert_eq!(words.to_string(), "mode: warm is unknown: raw, tempered or processed");
        assert_eq!(Invalid::missing("n", "set it").to_string(), "n: missing; set it");
        assert_eq!(one_of(&["all"]), "all");
        let status = tonic::Status::from(words);
        assert_eq!(status.code(), tonic::Code::InvalidArgument);
    }
}
