//! Credit: how much the manager may send. The window bounds what waits here for the caller. Credit for the
//! parts of an incomplete batch is granted again at once, so a batch larger than the window still completes.

/// Cost of a batch, in bytes and samples. Both are bounded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Amount {
    pub bytes: i64,
    pub samples: i64,
}

/// Account of one consumer.
#[derive(Debug)]
pub(crate) struct Credit {
    window: Amount,
    /// Granted on this attachment and not used.
    outstanding: Amount,
    /// Received as whole batches and not yet taken by the caller.
    held: Amount,
}

// === impl Credit ===

impl Credit {
    /// An account with nothing granted and nothing held.
    pub(crate) fn new(window: Amount) -> Self {
        Self { window, outstanding: Amount::default(), held: Amount::default() }
    }

    /// Starts a new attachment, which has no credit. Batches that wait for the caller still count.
    pub(crate) fn reattached(&mut self) {
        self.outstanding = Amount::default();
    }

    /// Takes a part that arrived from the credit, which may go below zero: the manager may send one batch
    /// beyond it.
    pub(crate) fn spent(&mut self, cost: Amount) {
        self.outstanding = self.outstanding.plus(cost, -1);
    }

    /// Adds a whole batch that now waits for the caller.
    pub(crate) fn held(&mut self, cost: Amount) {
        self.held = self.held.plus(cost, 1);
    }

    /// Removes a batch that the caller took.
    pub(crate) fn taken(&mut self, cost: Amount) {
        self.held = self.held.plus(cost, -1);
    }

    /// Credit to grant now. `None` until a quarter of the window is free, so that grants stay few.
    pub(crate) fn due(&self) -> Option<Amount> {
        let (window, used) = (self.window, self.outstanding.plus(self.held, 1));
        let bytes = (window.bytes - used.bytes).max(0);
        let samples = (window.samples - used.samples).max(0);
        (bytes * 4 >= window.bytes || samples * 4 >= window.samples)
            .then_some(Amount { bytes, samples })
    }

    /// Adds credit that was granted.
    pub(crate) fn granted(&mut self, amount: Amount) {
        self.outstanding = self.outstanding.plus(amount, 1);
    }
}

// === impl Amount ===

impl Amount {
    /// `self` and `sign` times `other`.
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
