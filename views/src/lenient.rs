//! Words that a newer manager may have more of.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize};

/// A word of the vocabulary `T`, or one that this version of the reader does not know, as it was written.
///
/// A manager writes known words only. A reader compares with `T` directly: `stage == LoadStage::Active`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Lenient<T> {
    /// A known word.
    Known(T),
    /// Another word; empty where none was written.
    Other(String),
}

/// Reads a `T` where the value is one, and nothing where it is anything else: for values of a newer manager.
pub(crate) fn readable<'de, T, D>(deserializer: D) -> Result<Option<T>, D::Error>
where
    T: Deserialize<'de>,
    D: Deserializer<'de>,
{
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Either<T> {
        Known(T),
        #[allow(dead_code)] // Takes whatever it is.
        Other(serde::de::IgnoredAny),
    }
    Ok(match Either::deserialize(deserializer)? {
        Either::Known(value) => Some(value),
        Either::Other(_) => None,
    })
}

// === impl Lenient ===

impl<T> From<T> for Lenient<T> {
    fn from(word: T) -> Self {
        Self::Known(word)
    }
}

impl<T: PartialEq> PartialEq<T> for Lenient<T> {
    fn eq(&self, other: &T) -> bool {
        matches!(self, Self::Known(word) if word == other)
    }
}

/// The empty word.
impl<T> Default for Lenient<T> {
    fn default() -> Self {
        Self::Other(String::new())
    }
}

impl<T: fmt::Display> fmt::Display for Lenient<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Known(word) => word.fmt(f),
            Self::Other(word) => f.pad(word),
        }
    }
}

impl<T: fmt::Debug> fmt::Debug for Lenient<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Known(word) => word.fmt(f),
            Self::Other(word) => write!(f, "{word:?}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use anabranch_proto::LoadStage;
    use std::collections::BTreeMap;

    #[test]
    fn a_known_word_is_the_vocabularys_and_another_is_kept_as_written() {
        let known: Lenient<LoadStage> = serde_json::from_str("\"active\"").expect("read");
        assert!(known == LoadStage::Active && known != LoadStage::Failed);
        let other: Lenient<LoadStage> = serde_json::from_str("\"warming\"").expect("read");
        assert!(other != LoadStage::Active);
        assert_eq!((known.to_string(), other.to_string()), ("active".into(), "warming".into()));
        assert_eq!(serde_json::to_string(&other).expect("written"), "\"warming\"");
    }

    #[test]
    fn words_are_keys_of_maps_too() {
        let text = r#"{"active":2,"warming":1}"#;
        let read: BTreeMap<Lenient<LoadStage>, u32> = serde_json::from_str(text).expect("read");
        assert_eq!(read[&LoadStage::Active.into()], 2);
        assert_eq!(serde_json::to_string(&read).expect("written"), text);
    }
}
