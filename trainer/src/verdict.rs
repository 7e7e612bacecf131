//! Verdicts: what the manager says about each submitted group.

/// Answer of the manager on one submitted group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Key of the group.
    pub key: String,
    /// Fate of the group.
    pub outcome: Outcome,
}

/// Fate of a submitted group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The manager took it with this submit.
    Accepted,
    /// The manager had its key already: nothing more will be made.
    Duplicate,
    /// The manager can never make it as it is.
    Rejected {
        /// Reason and remedy.
        why: String,
    },
    /// The manager had no room for it until the submit's time was up. It may be submitted again.
    Full {
        /// Reason.
        why: String,
    },
}

// === impl Verdict ===

impl Verdict {
    /// True if the manager has the group, from this submit or an earlier one.
    pub fn is_taken(&self) -> bool {
        self.why_not().is_none()
    }

    /// Reason why the manager does not have the group; `None` if it has.
    pub fn why_not(&self) -> Option<&str> {
        match &self.outcome {
            Outcome::Accepted | Outcome::Duplicate => None,
            Outcome::Rejected { why } | Outcome::Full { why } => Some(why),
        }
    }
}
