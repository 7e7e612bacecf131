//! Log output of a process, to stderr: filter and format. Owns no metrics.

use std::io::{self, IsTerminal};

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::FmtSpan;
use tracing_subscriber::util::SubscriberInitExt;

/// Environment variable with the log filter for a process without `--log`.
pub const LOG_ENV: &str = "ANABRANCH_LOG";

/// Format of log lines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// One line per event, for people.
    #[default]
    Text,
    /// One JSON object per line, for machines.
    Json,
}

/// A log filter that cannot be parsed.
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot read the log filter {filter:?} (from --log or {LOG_ENV}): {source}. \
     Examples: info, debug, anabranch_manager=debug,info"
)]
pub struct InvalidFilter {
    /// The filter as given.
    pub filter: String,
    source: tracing_subscriber::filter::ParseError,
}

/// Starts logging with `filter`, else the filter of [`LOG_ENV`], else `info`. False if logging was
/// started before, as in tests: the earlier settings stay.
pub fn init(filter: Option<&str>, format: LogFormat) -> Result<bool, InvalidFilter> {
    let from_env = std::env::var(LOG_ENV).ok().filter(|text| !text.trim().is_empty());
    let filter = parse(filter.map(str::to_owned).or(from_env).unwrap_or_else(|| "info".into()))?;
    let base = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_span_events(FmtSpan::NONE);
    let started = match format {
        LogFormat::Text => base.compact().with_ansi(io::stderr().is_terminal()).finish().try_init(),
        LogFormat::Json => base.json().flatten_event(true).finish().try_init(),
    };
    Ok(started.is_ok())
}

fn parse(filter: String) -> Result<EnvFilter, InvalidFilter> {
    EnvFilter::try_new(&filter).map_err(|source| InvalidFilter { filter, source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn starting_twice_keeps_the_first() {
        assert!(init(Some("warn"), LogFormat::Text).expect("valid"));
        assert!(!init(Some("trace"), LogFormat::Json).expect("valid"));
    }

    #[test]
    fn a_filter_that_cannot_be_read_is_named() {
        let error = init(Some("a=b=c"), LogFormat::Text).expect_err("not a filter");
        assert!(error.to_string().contains("\"a=b=c\""), "{error}");
    }
}
