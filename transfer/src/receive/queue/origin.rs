//! Origins: sources that have parts of one whole between them. One of them stands in for another chunk by
//! chunk, so an origin is in charge of a stripe, not a source. A source that is no part is its own origin.

use super::SourceId;
use super::source::Source;

/// The first source of it, which names it.
pub(super) type OriginId = SourceId;

#[derive(Debug)]
pub(super) struct Origins {
    /// Origin of each source.
    of: Vec<OriginId>,
    /// True for each source that has a part, and says at once which.
    part: Vec<bool>,
    /// Sources of each origin; empty for a source that is not the first of one.
    members: Vec<Vec<SourceId>>,
}

// === impl Origins ===

impl Origins {
    /// `names` by source; without a name it is on its own.
    pub(super) fn new(names: &[String], sources: usize) -> Origins {
        let name = |ix: SourceId| names.get(ix).filter(|name| !name.is_empty());
        let first = |ix: SourceId| match name(ix) {
            Some(own) => (0..ix).find(|other| name(*other) == Some(own)).unwrap_or(ix),
            None => ix,
        };
        let of: Vec<OriginId> = (0..sources).map(first).collect();
        let mut members = vec![Vec::new(); sources];
        of.iter().enumerate().for_each(|(source, origin)| members[*origin].push(source));
        let part = (0..sources).map(|ix| name(ix).is_some()).collect();
        Origins { of, part, members }
    }

    pub(super) fn of(&self, source: SourceId) -> OriginId {
        self.of[source]
    }

    /// True if the source has a part of the version, neither all nor ever more of it.
    pub(super) fn is_part(&self, source: SourceId) -> bool {
        self.part[source]
    }

    /// True if a live source of the origin has something for the stripe, or may have.
    pub(super) fn is_live(&self, origin: OriginId, stripe: usize, sources: &[Source]) -> bool {
        let serves = |ix: &SourceId| sources[*ix].is_live() && sources[*ix].may_give(stripe);
        self.members[origin].iter().any(serves)
    }
}
