//! Pages of the state: a big fleet is shown part by part.

use std::fmt;

/// Most engines on one page, and the default.
pub const MAX_PAGE: u32 = 256;

/// The part of the fleet that one answer shows: up to `limit` engines, in the order of their sessions, from
/// session `from` on. Everything but the engines and their progress is the same on every page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct StatePage {
    from: u64,
    limit: u32,
}

/// A page was asked for that is larger than [`MAX_PAGE`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadPage {
    limit: u32,
}

// === impl StatePage ===

impl StatePage {
    /// Page of `limit` engines from session `from` on; a `limit` of 0 means [`MAX_PAGE`].
    ///
    /// # Errors
    /// [`BadPage`] for a `limit` over [`MAX_PAGE`].
    pub fn new(from: u64, limit: u32) -> Result<Self, BadPage> {
        match limit {
            0 => Ok(Self::starting(from)),
            1..=MAX_PAGE => Ok(Self { from, limit }),
            _ => Err(BadPage { limit }),
        }
    }

    /// Largest page from session `from` on.
    pub fn starting(from: u64) -> Self {
        Self { from, limit: MAX_PAGE }
    }

    /// First session that may be on the page.
    pub fn from(self) -> u64 {
        self.from
    }

    /// Most engines on the page, 1 to [`MAX_PAGE`].
    pub fn limit(self) -> usize {
        self.limit as usize
    }
}

/// The first page, as large as a page may be.
impl Default for StatePage {
    fn default() -> Self {
        Self::starting(0)
    }
}

// === impl BadPage ===

impl fmt::Display for BadPage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { limit } = self;
        write!(
            f,
            "limit {limit}: a page has at most {MAX_PAGE} engines; ask for the rest with from=<next of the answer>"
        )
    }
}

impl std::error::Error for BadPage {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_bounded_and_zero_means_the_default() {
        assert_eq!(StatePage::new(3, 0), Ok(StatePage::starting(3)));
        assert_eq!(StatePage::new(0, MAX_PAGE), Ok(StatePage::default()));
        assert_eq!(StatePage::new(0, 1).map(StatePage::limit), Ok(1));
        let error = StatePage::new(0, 257).expect_err("too large").to_string();
        assert!(error.starts_with("limit 257: a page has at most 256 engines"), "{error}");
    }
}
