//! Words that people and programs name things with: job names, engine ids, group keys, addresses.

use crate::invalid::{Fault, Invalid};
use crate::limits::{MAX_ID_BYTES, check_len};

/// Refuses a name that people type (a job, an engine): what [`check_word`] refuses, and white space.
pub fn check_name(field: &str, text: &str) -> Result<(), Invalid> {
    check_word(field, text)?;
    if text.contains(char::is_whitespace) {
        return Err(Invalid::rule(
            field,
            format!("{text:?} has a space in it; write it as one word"),
        ));
    }
    Ok(())
}

/// Refuses a word (a group's key, an address) that is empty, or that [`check_optional_word`] refuses.
pub fn check_word(field: &str, text: &str) -> Result<(), Invalid> {
    if text.is_empty() {
        let remedy = format!("write 1 to {MAX_ID_BYTES} printable bytes").into();
        return Err(Invalid::new(field, Fault::Empty { remedy }));
    }
    check_optional_word(field, text)
}

/// Refuses a text of more than [`MAX_ID_BYTES`] bytes, or with a control character. It may be empty.
pub fn check_optional_word(field: &str, text: &str) -> Result<(), Invalid> {
    check_len(field, text.len(), MAX_ID_BYTES, "bytes", "")?;
    match text.chars().find(|c| c.is_control()) {
        Some(odd) => Err(Invalid::rule(
            field,
            format!("has the unprintable character {odd:?}; leave it out"),
        )),
        None => Ok(()),
    }
}

/// Refuses a list in which [`check_word`] refuses one.
pub fn check_words(field: &str, texts: &[String]) -> Result<(), Invalid> {
    texts.iter().try_for_each(|text| check_word(field, text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bound_of_a_word_is_refused_with_its_rule() {
        let long = "x".repeat(MAX_ID_BYTES + 1);
        for (refused, says) in [
            (check_word("key", ""), "key: empty; write 1 to 200 printable bytes"),
            (check_word("key", &long), "key: 201 bytes, at most 200 are allowed"),
            (
                check_word("key", "a\u{7}"),
                "key: has the unprintable character '\\u{7}'; leave it out",
            ),
            (check_name("job", "a b"), "job: \"a b\" has a space in it; write it as one word"),
            (check_name("job", ""), "job: empty; write 1 to 200 printable bytes"),
            (
                check_words("addresses", &["h:1".into(), String::new()]),
                "addresses: empty; write 1 to 200 printable bytes",
            ),
        ] {
            assert_eq!(refused.expect_err(says).to_string(), says);
        }
        assert_eq!(check_word("key", &"x".repeat(MAX_ID_BYTES)), Ok(()));
        assert_eq!(check_optional_word("session", ""), Ok(()));
    }
}
