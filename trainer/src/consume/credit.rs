//! How much the manager may send. The window bounds what waits here for the caller; parts of a batch
//! that is still incomplete are replaced at once, so a batch larger than the window still completes.

/// What a batch costs: bytes and samples, both bounded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Amount {
    pub bytes: i64,
    pub samples: i64,
}

/// Per attachment: `outstanding` was granted and not used, `held` was received and not yet taken.
#[derive(Debug)]
pub(crate) struct Credit {
    window: Amount,
    outstanding: Amount,
    held: Amount,
}

// === impl Credit ===

impl Credit {
    pub(crate) fn new(window: Amount) -> Self {
        Self { window, outstanding: Amount::default(), held: Amount::default() }
    }

    /// A new attachment starts without credit; what waits for the caller still counts.
    pub(crate) fn reattached(&mut self) {
        self.outstanding = Amount::default();
    }

    /// A part arrived. May go below zero: the manager may send one batch beyond its credit.
    pub(crate) fn spent(&mut self, cost: Amount) {
        self.outstanding = self.outstanding.plus(cost, -1);
    }

    /// A whole batch now waits for the caller.
    pub(crate) fn held(&mut self, cost: Amount) {
        self.held = self.held.plus(cost, 1);
    }

    /// The caller took it.
    pub(crate) fn taken(&mut self, cost: Amount) {
        self.held = self.held.plus(cost, -1);
    }

    /// What to grant now; nothing until a quarter of the window is due, so that grants stay few.
    pub(crate) fn due(&self) -> Option<Amount> {
        let (window, used) = (self.window, self.outstanding.plus(self.held, 1));
        let bytes = (window.bytes - used.bytes).max(0);
        let samples = (window.samples - used.samples).max(0);
        (bytes * 4 >= window.bytes || samples * 4 >= window.samples)
            .then_some(Amount { bytes, samples })
    }

    pub(crate) fn granted(&mut self, amount: Amount) {
        self.outstanding = self.outstanding.plus(amount, 1);
    }
}

// === impl Amount ===

impl Amount {
    pub(crate) fn plus(self, other: Amount, sign: i64) -> Amount {
        Amount {
            bytes: self.bytes.saturating_add(sign * other.bytes),
            samples: self.samples.saturating_add(sign * other.samples),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WINDOW: Amount = Amount { bytes: 1000, samples: 100 };

    fn amount(bytes: i64, samples: i64) -> Amount {
        Amount { bytes, samples }
    }

    fn grant(credit: &mut Credit) -> Option<Amount> {
        let due = credit.due()?;
        credit.granted(due);
        Some(due)
    }

    #[test]
    fn the_window_is_granted_once_and_topped_up_in_quarters() {
        let mut credit = Credit::new(WINDOW);
        assert_eq!(grant(&mut credit), Some(WINDOW));
        assert_eq!(grant(&mut credit), None);
        credit.spent(amount(249, 1));
        assert_eq!(grant(&mut credit), None);
        credit.spent(amount(1, 0));
        assert_eq!(grant(&mut credit), Some(amount(250, 1)));
    }

    #[test]
    fn a_caller_that_takes_nothing_stops_the_manager_and_taking_starts_it() {
        let mut credit = Credit::new(WINDOW);
        grant(&mut credit);
        for _ in 0..4 {
            credit.spent(amount(250, 5));
            credit.held(amount(250, 5));
            assert_eq!(grant(&mut credit), None);
        }
        credit.taken(amount(250, 5));
        assert_eq!(grant(&mut credit), Some(amount(250, 5)));
    }

    #[test]
    fn a_batch_larger_than_the_window_completes() {
        let mut credit = Credit::new(WINDOW);
        grant(&mut credit);
        for _ in 0..5 {
            credit.spent(amount(1000, 10));
            assert_eq!(grant(&mut credit), Some(amount(1000, 10)));
        }
        credit.held(amount(5000, 50));
        credit.spent(amount(1000, 10));
        assert_eq!(grant(&mut credit), None, "one whole batch waits, the next one must not start");
        credit.taken(amount(5000, 50));
        assert_eq!(grant(&mut credit), Some(amount(1000, 10)));
    }

    #[test]
    fn a_new_attachment_counts_what_still_waits() {
        let mut credit = Credit::new(WINDOW);
        grant(&mut credit);
        credit.spent(amount(400, 4));
        credit.held(amount(400, 4));
        credit.reattached();
        assert_eq!(grant(&mut credit), Some(amount(600, 96)));
    }
}
