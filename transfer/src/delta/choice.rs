//! The choice between the full image and a delta, by the time that each would take. Pure: the fetcher measures
//! the rates.

/// Way by which a version comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// The whole image.
    Full,
    /// The delta to the base that is here.
    Delta,
}

/// Rates that a receiver measured last, in bytes a second; `None` before enough was moved to tell.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Rates {
    /// Rate of the link.
    pub link_bytes_per_s: Option<f64>,
    /// Bytes of the image that come out of applying deltas.
    pub apply_bytes_per_s: Option<f64>,
}

/// A delta of more than this share of the missing bytes spares too little to be worth the work.
const WORTH: f64 = 0.8;
/// A delta is preferred until the full version would be here in less than this share of its time: it
/// also spares the sources' links, which others wait for.
const PATIENCE: f64 = 0.7;

/// `missing_bytes` of the image come either over the link, or out of `delta_bytes` that are applied as
/// they come in.
pub fn choose(delta_bytes: u64, missing_bytes: u64, rates: Rates) -> Way {
    let (delta, missing) = (delta_bytes as f64, missing_bytes as f64);
    if delta_bytes == 0 || delta >= WORTH * missing {
        return Way::Full;
    }
    let (Some(link), Some(apply)) = (rates.link_bytes_per_s, rates.apply_bytes_per_s) else {
        return Way::Delta;
    };
    let by_delta = (delta / link).max(missing / apply);
    if missing / link < PATIENCE * by_delta { Way::Full } else { Way::Delta }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn rates(link: f64, apply: f64) -> Rates {
        Rates { link_bytes_per_s: Some(link), apply_bytes_per_s: Some(apply) }
    }

    #[test]
    fn without_rates_the_bytes_decide() {
        assert_eq!(choose(GIB / 100, GIB, Rates::default()), Way::Delta);
        assert_eq!(choose(GIB * 9 / 10, GIB, Rates::default()), Way::Full);
        assert_eq!(choose(0, GIB, Rates::default()), Way::Full, "there is none");
        let half = Rates { apply_bytes_per_s: None, ..rates(1e12, 1.0) };
        assert_eq!(choose(GIB / 100, GIB, half), Way::Delta);
    }

    #[test]
    fn a_link_faster_than_applying_brings_the_full_version() {
        assert_eq!(choose(GIB / 100, GIB, rates(25e9, 4e9)), Way::Full);
        assert_eq!(
            choose(GIB / 100, GIB, rates(4.1e9, 4e9)),
            Way::Delta,
            "about as fast: fewer bytes"
        );
        assert_eq!(choose(GIB / 100, GIB, rates(25e6, 4e9)), Way::Delta);
    }

    #[test]
    fn what_is_missing_counts_not_the_size_of_the_version() {
        assert_eq!(choose(GIB / 100, GIB / 120, rates(25e6, 4e9)), Way::Full);
    }
}
