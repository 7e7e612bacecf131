//! The digests of many seeds as a file: one line `seed digest` each, sorted by seed, so that `diff` works.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

/// Text that stands for the digest of a world that broke a promise.
const BROKEN: &str = "broken";

/// Digests by seed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Digests(BTreeMap<u64, String>);

/// A line of a file of digests that is not `seed digest`.
#[derive(Debug, PartialEq, Eq)]
pub struct BadDigests {
    /// Line of the file, from 1.
    pub line: usize,
    /// Content of the line.
    pub text: String,
}

impl Digests {
    /// Adds the digest of a seed; `None` if its world broke a promise.
    pub fn insert(&mut self, seed: u64, digest: Option<&str>) {
        self.0.insert(seed, digest.unwrap_or(BROKEN).to_owned());
    }

    /// Number of seeds.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// True if there is no seed.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Seeds of `self` whose digest in `base` is another one, or missing. Seeds that only `base` has are no difference:
    /// fewer may be run than were written.
    pub fn differing(&self, base: &Digests) -> Vec<u64> {
        let differs = |(seed, digest): &(&u64, &String)| base.0.get(seed) != Some(digest);
        self.0.iter().filter(differs).map(|(seed, _)| *seed).collect()
    }
}

impl fmt::Display for Digests {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|(seed, digest)| writeln!(f, "{seed} {digest}"))
    }
}

impl fmt::Display for BadDigests {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { line, text } = self;
        write!(f, "line {line} is {text:?}, not a seed and its digest; write the file again")
    }
}

impl std::error::Error for BadDigests {}

impl FromStr for Digests {
    type Err = BadDigests;

    fn from_str(text: &str) -> Result<Self, BadDigests> {
        let parse = |(at, line): (usize, &str)| {
            let (seed, digest) = line.split_once(' ').unwrap_or((line, ""));
            match seed.parse() {
                Ok(seed) if !digest.is_empty() => Ok((seed, digest.to_owned())),
                _ => Err(BadDigests { line: at + 1, text: line.to_owned() }),
            }
        };
        text.lines().enumerate().map(parse).collect::<Result<_, _>>().map(Self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_of_digests_is_read_as_it_was_written() {
        let mut digests = Digests::default();
        digests.insert(10, Some("ab"));
        digests.insert(9, None);
        assert_eq!(digests.to_string(), "9 broken\n10 ab\n");
        assert_eq!(digests.to_string().parse(), Ok(digests));
        let bad = BadDigests { line: 2, text: "x".into() };
        assert_eq!("9 broken\nx\n".parse::<Digests>(), Err(bad));
    }

    #[test]
    fn other_and_missing_digests_differ_and_seeds_that_were_not_run_do_not() {
        let base: Digests = "1 a\n2 b\n4 d\n".parse().expect("well formed");
        let now: Digests = "1 a\n2 x\n3 c\n".parse().expect("well formed");
        assert_eq!(now.differing(&base), [2, 3]);
    }
}
