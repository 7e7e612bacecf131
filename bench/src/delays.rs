//! Delays of tokens, computed from three records: the engines' notes, the link's tap, and the trainer's arrivals. All
//! three read the one monotonic clock of this machine. Pure.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::meter::Ready;
use crate::tap::Passed;

/// Time before the window's end in which chunks are not counted: they may still have been on their way.
const LATEST_NS: u64 = 1_000_000_000;

/// Delays of one window, sorted, in milliseconds.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Delays {
    /// Delays between the making of a chunk and the manager's socket.
    pub link_ms: Vec<f64>,
    /// Delays between the making of a chunk and the manager's acknowledgement, which says that it has the tokens.
    pub acked_ms: Vec<f64>,
    /// Delays between the making of an answer's last token and its arrival in the trainer.
    pub delivery_ms: Vec<f64>,
    /// Chunks of the tapped engine that never passed the tap, or were never acknowledged.
    pub unmatched: u64,
}

impl Delays {
    /// Delays of the chunks made in `window`; `arrivals` are pairs of a sample's seed and the time of its arrival.
    pub fn new(
        chunks: &[Ready],
        passed: &[Passed],
        arrivals: &[(u64, u64)],
        window: Range<u64>,
    ) -> Self {
        let mut out = Self::default();
        let links = by_seed(passed, |p| p.seed);
        let inside = |c: &&Ready| window.start <= c.at_ns && c.at_ns + LATEST_NS < window.end;
        // A client that lagged makes one chunk ready twice: the first time counts.
        let mut first: BTreeMap<(u64, u64), &Ready> = BTreeMap::new();
        for chunk in chunks {
            first.entry((chunk.seed, chunk.tokens)).or_insert(chunk);
        }
        let ended: BTreeMap<u64, u64> =
            first.values().filter(|c| c.last && inside(c)).map(|c| (c.seed, c.at_ns)).collect();
        for chunk in first.values().filter(|c| inside(c)) {
            // An engine that is not tapped, or a sample whose start was not seen.
            let Some(seen) = links.get(&chunk.seed) else { continue };
            let covers = |p: &&&Passed| (p.from..p.upto).contains(&(chunk.tokens - 1));
            match seen.iter().find(covers) {
                Some(Passed { at_ns, acked_ns: Some(acked_ns), .. }) => {
                    out.link_ms.push(ms(chunk.at_ns, *at_ns));
                    out.acked_ms.push(ms(chunk.at_ns, *acked_ns));
                }
                _ => out.unmatched += 1,
            }
        }
        let delivery = |&(seed, at): &(u64, u64)| ended.get(&seed).map(|ended| ms(*ended, at));
        out.delivery_ms = arrivals.iter().filter_map(delivery).collect();
        for list in [&mut out.link_ms, &mut out.acked_ms, &mut out.delivery_ms] {
            list.sort_by(f64::total_cmp);
        }
        out
    }
}

/// Quantile of sorted values; NaN if there are none.
pub fn quantile(sorted: &[f64], share: f64) -> f64 {
    match sorted.len() {
        0 => f64::NAN,
        len => sorted[((len as f64 * share) as usize).min(len - 1)],
    }
}

fn by_seed<T>(items: &[T], seed: impl Fn(&T) -> u64) -> BTreeMap<u64, Vec<&T>> {
    let mut out: BTreeMap<u64, Vec<&T>> = BTreeMap::new();
    for item in items {
        out.entry(seed(item)).or_default().push(item);
    }
    out
}

fn ms(from_ns: u64, to_ns: u64) -> f64 {
    to_ns.saturating_sub(from_ns) as f64 / 1e6
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    #[test]
    fn chunks_are_found_again_by_seed_and_place() {
        let ready = |seed, tokens, last, at| Ready { seed, tokens, last, at_ns: at * MS };
        let passed = |seed, from, upto, at, acked: Option<u64>| Passed {
            seed,
            from,
            upto,
            at_ns: at * MS,
            acked_ns: acked.map(|acked| acked * MS),
        };
        let chunks = [
            ready(1, 8, false, 100),
            ready(1, 8, false, 500),
            ready(1, 16, true, 200),
            ready(2, 8, true, 300),
            ready(1, 24, false, 90_000),
        ];
        let links = [passed(1, 0, 8, 110, Some(112)), passed(1, 8, 16, 230, None)];
        let delays = Delays::new(&chunks, &links, &[(1, 240 * MS), (3, 1)], 50 * MS..10_000 * MS);
        assert_eq!((delays.link_ms, delays.acked_ms), (vec![10.0], vec![12.0]));
        assert_eq!((delays.delivery_ms, delays.unmatched), (vec![40.0], 1));
    }

    #[test]
    fn quantiles_are_values_that_were_seen() {
        let values: Vec<f64> = (0..100).map(f64::from).collect();
        assert_eq!(
            (quantile(&values, 0.5), quantile(&values, 0.99), quantile(&values, 1.0)),
            (50.0, 99.0, 99.0)
        );
        assert!(quantile(&[], 0.5).is_nan());
    }
}
