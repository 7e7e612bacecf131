//! A reader of the manager's own histograms from `/metrics`. The manager decides what they measure.

use std::collections::BTreeMap;
use std::time::Duration;

const WITHIN: Duration = Duration::from_secs(5);

/// Histograms in seconds that a bench shows: (family, id of the figure).
const FAMILIES: [(&str, &str); 2] = [
    ("anabranch_tick_age_seconds", "agent_tick_age"),
    ("anabranch_delivery_seconds", "manager_delivery"),
];

/// Quantiles of the manager's histograms at one time.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Scrape {
    /// Quantiles in milliseconds, by id of the figure.
    pub quantiles: BTreeMap<String, f64>,
}

impl Scrape {
    /// Reads the histograms of `manager`; empty if it does not answer, because they are an extra.
    pub async fn read(manager: &str) -> Self {
        let text = async {
            let request = reqwest::Client::new().get(format!("{manager}/metrics")).timeout(WITHIN);
            request.send().await?.error_for_status()?.text().await
        };
        match text.await {
            Ok(text) => Self::parse(&text),
            Err(error) => {
                tracing::warn!(%error, "no metrics from the manager");
                Self::default()
            }
        }
    }

    fn parse(text: &str) -> Self {
        let mut quantiles = BTreeMap::new();
        for (family, id) in FAMILIES {
            let buckets = buckets(text, family);
            for (name, share) in [("p50", 0.5), ("p99", 0.99)] {
                if let Some(seconds) = quantile(&buckets, share) {
                    quantiles.insert(format!("{id}_{name}"), seconds * 1e3);
                }
            }
        }
        Self { quantiles }
    }
}

/// Pairs of (upper bound in seconds, count up to it), summed over all other labels.
fn buckets(text: &str, family: &str) -> Vec<(f64, f64)> {
    let prefix = format!("{family}_bucket{{");
    let mut sums: Vec<(f64, f64)> = Vec::new();
    for line in text.lines().filter_map(|line| line.strip_prefix(&prefix)) {
        let Some((labels, count)) = line.rsplit_once("} ") else { continue };
        let Some(bound) = labels.split("le=\"").nth(1).and_then(|rest| rest.split('"').next())
        else {
            continue;
        };
        let bound = bound.parse().unwrap_or(f64::INFINITY);
        let count: f64 = count.trim().parse().unwrap_or(0.0);
        match sums.iter_mut().find(|(known, _)| *known == bound) {
            Some((_, sum)) => *sum += count,
            None => sums.push((bound, count)),
        }
    }
    sums.sort_by(|a, b| a.0.total_cmp(&b.0));
    sums
}

/// Quantile by linear interpolation inside a bucket, as Prometheus computes it; the last finite bound if it lies above.
fn quantile(buckets: &[(f64, f64)], share: f64) -> Option<f64> {
    let total = buckets.last()?.1;
    if total == 0.0 {
        return None;
    }
    let rank = share * total;
    let (mut low, mut below) = (0.0, 0.0);
    for &(bound, count) in buckets {
        if count >= rank && bound.is_finite() {
            return Some(low + (bound - low) * (rank - below) / (count - below).max(1.0));
        }
        if bound.is_finite() {
            (low, below) = (bound, count);
        }
    }
    Some(low)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "# TYPE anabranch_tick_age_seconds histogram\n\
        anabranch_tick_age_seconds_bucket{le=\"0.01\"} 50\n\
        anabranch_tick_age_seconds_bucket{le=\"0.02\"} 90\n\
        anabranch_tick_age_seconds_bucket{le=\"0.04\"} 100\n\
        anabranch_tick_age_seconds_bucket{le=\"+Inf\"} 100\n\
        anabranch_tick_age_seconds_sum 1.2\n";

    #[test]
    fn quantiles_come_from_the_buckets() {
        let scrape = Scrape::parse(TEXT);
        assert_eq!(scrape.quantiles.len(), 2, "a family without samples is left out");
        assert!((scrape.quantiles["agent_tick_age_p50"] - 10.0).abs() < 1e-9);
        assert!((scrape.quantiles["agent_tick_age_p99"] - 38.0).abs() < 1e-9);
    }

    #[test]
    fn a_value_above_all_bounds_gives_the_last_one() {
        let buckets = [(0.01, 1.0), (f64::INFINITY, 100.0)];
        assert_eq!(quantile(&buckets, 0.99), Some(0.01));
    }
}
