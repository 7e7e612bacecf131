//! Nodes that may stand in for a dead parent, so that no orphan goes to one whose egress is taken.

use std::collections::BTreeSet;

use super::Holder;

/// Nodes above a receiver in one stripe, the nearest first. The nearest that lives has egress to spare
/// when the parent dies; those who would come too early in the list stand in for nobody there.
pub(super) struct Above<'a> {
    chain: &'a [Holder],
    named: BTreeSet<Holder>,
}

impl<'a> Above<'a> {
    pub(super) fn parent_of(chain: &'a [Holder]) -> Self {
        Self { chain: chain.get(1..).unwrap_or_default(), named: BTreeSet::new() }
    }

    /// True if it is the nearest of those not named yet.
    pub(super) fn name(&mut self, holder: Holder) -> bool {
        self.named.insert(holder);
        let is_next = self.chain.first() == Some(&holder);
        let passed = self.chain.iter().take_while(|at| self.named.contains(at)).count();
        self.chain = &self.chain[passed..];
        is_next
    }
}
