//! Takes a tick apart: checks its columns once, gives each segment to its page, then the ends.

use std::collections::BTreeMap;

use anabranch_proto::pb::{self, end::Why};
use anabranch_proto::tokens::WIDTH;
use anabranch_proto::{Attempt, SampleId, SessionId, Version};
use anabranch_runtime::clock::Now;

use super::page::{Appended, ColumnRecord, Page, Piece};
use super::{Ended, Fact, Finished, Ledger};

/// What a tick came to.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Taken {
    /// What the deciding core must hear, at most one fact a sample.
    pub facts: Vec<Fact>,
    /// New tokens that were kept.
    pub tokens: u64,
}

/// The tick as a whole makes no sense; none of it was taken.
#[derive(Debug, thiserror::Error)]
pub enum BadTick {
    #[error(
        "tick {seq}: {tokens} bytes of tokens and {logprobs} of log-probabilities for {counted} tokens"
    )]
    Columns { seq: u64, tokens: usize, logprobs: usize, counted: u64 },
    #[error("tick {seq}: segment {segment} names version {index} of {known}")]
    VersionIndex { seq: u64, segment: usize, index: u32, known: usize },
    #[error("tick {seq}: {source}")]
    Version { seq: u64, source: anabranch_proto::version::BadVersion },
    #[error("tick {seq}: column {name} has {bytes} bytes for {rows} tokens of {row_bytes} bytes")]
    Extra { seq: u64, name: String, bytes: usize, rows: u64, row_bytes: usize },
}

pub(super) fn apply(
    ledger: &Ledger,
    now: Now,
    session: SessionId,
    tick: &pb::Tick,
) -> Result<Taken, BadTick> {
    let versions = versions(tick)?;
    let columns = columns(tick)?;
    // At most one fact a sample and tick: the last word on it.
    let mut facts: BTreeMap<(SampleId, Attempt), Fact> = BTreeMap::new();
    let mut tokens = 0;
    let mut at = 0;
    for seg in &tick.segs {
        let rows = at..at + seg.count as usize;
        at = rows.end;
        let sample = SampleId::new(seg.group, seg.index);
        let piece = Piece {
            session,
            attempt: Attempt(seg.attempt),
            offset: seg.offset,
            tokens: &tick.tokens[rows.start * WIDTH..rows.end * WIDTH],
            logprobs: &tick.logprobs[rows.start * WIDTH..rows.end * WIDTH],
            version: versions[seg.version_ix as usize],
            exact: !seg.inexact,
            kv_recomputed: !seg.kv_stale,
        };
        let (new, fact) = append(ledger, now, sample, &piece, &columns, rows);
        tokens += u64::from(new);
        if let Some(fact) = fact {
            facts.insert((sample, piece.attempt), fact);
        }
    }
    for end in &tick.ends {
        let Some(sample) = end.sample else { continue };
        let key = (SampleId::from(sample), Attempt(end.attempt));
        if let Some(fact) = close(ledger, session, key, end, facts.get(&key)) {
            facts.insert(key, fact);
        }
    }
    Ok(Taken { facts: facts.into_values().collect(), tokens })
}

/// Number of new tokens, and what the core must hear.
fn append(
    ledger: &Ledger,
    now: Now,
    sample: SampleId,
    piece: &Piece<'_>,
    columns: &[(ColumnRecord, &[u8])],
    rows: std::ops::Range<usize>,
) -> (u32, Option<Fact>) {
    let mut shard = ledger.shard(sample);
    let shard = &mut *shard;
    let stats = &mut shard.stats;
    let count = rows.len() as u64;
    let Some(page) = shard.pages.get_mut(&sample) else {
        stats.stale_tokens += count;
        return (0, None);
    };
    let attempt = piece.attempt;
    let ended = |page: &Page, why| {
        let (kept, oldest) = (page.kept(), page.oldest());
        (0, Some(Fact::Ended { sample, attempt, kept, oldest, why }))
    };
    match page.append(now, piece) {
        Appended::Stale => {
            stats.stale_tokens += count;
            (0, None)
        }
        Appended::Foreign => {
            stats.foreign_tokens += count;
            (0, None)
        }
        Appended::Grew { new, repeated, tell } => {
            stats.tokens += u64::from(new);
            stats.repeated_tokens += u64::from(repeated);
            put_columns(page, piece.offset, columns, rows);
            let (kept, oldest) = (page.kept(), page.oldest());
            (new, tell.then_some(Fact::Grew { sample, attempt, kept, oldest }))
        }
        Appended::Finished { new, repeated, past_stop } => {
            stats.tokens += u64::from(new);
            stats.repeated_tokens += u64::from(repeated);
            stats.past_stop_tokens += u64::from(past_stop);
            put_columns(page, piece.offset, columns, rows);
            let how = page.finished().expect("append said so").clone();
            let (kept, oldest) = (page.kept(), page.oldest());
            (new, Some(Fact::Finished { sample, attempt, kept, oldest, how, running: true }))
        }
        Appended::PastPin(what) => {
            stats.stale_tokens += count;
            page.end_attempt();
            ended(page, Ended::Lost(what))
        }
        Appended::Broken(what) => {
            stats.broken += 1;
            page.end_attempt();
            ended(page, Ended::Broken(what))
        }
    }
}

fn close(
    ledger: &Ledger,
    session: SessionId,
    key: (SampleId, Attempt),
    end: &pb::End,
    earlier: Option<&Fact>,
) -> Option<Fact> {
    let (sample, attempt) = key;
    let mut shard = ledger.shard(sample);
    let shard = &mut *shard;
    let page = shard.pages.get_mut(&sample)?;
    if let Some(Fact::Finished { kept, oldest, how, .. }) = earlier {
        let how = how.clone();
        return Some(Fact::Finished {
            sample,
            attempt,
            kept: *kept,
            oldest: *oldest,
            how,
            running: false,
        });
    }
    if page.runs_on(attempt) != Some(session) {
        return None;
    }
    let (kept, oldest) = (page.kept(), page.oldest());
    let ended = |why| Some(Fact::Ended { sample, attempt, kept, oldest, why });
    let why = Why::try_from(end.why).unwrap_or(Why::Unspecified);
    let says_finish = matches!(why, Why::StopId | Why::StopString | Why::Length);
    if says_finish && end.at != kept {
        page.end_attempt();
        shard.stats.broken += 1;
        return ended(Ended::Broken(format!("finish at token {}, but {kept} arrived", end.at)));
    }
    let how = match why {
        Why::StopId | Why::StopString => Finished::Stop(end.matched.clone()),
        Why::Length => Finished::Length,
        other => {
            page.end_attempt();
            return ended(unfinished(other, &end.matched));
        }
    };
    page.finish(how.clone());
    Some(Fact::Finished { sample, attempt, kept, oldest, how, running: false })
}

fn unfinished(why: Why, detail: &str) -> Ended {
    match why {
        Why::Aborted => Ended::Aborted,
        Why::Refused => Ended::Refused(detail.to_owned()),
        Why::Busy => Ended::Busy(detail.to_owned()),
        Why::Lost => Ended::Lost(detail.to_owned()),
        other => Ended::Broken(format!("end with reason {other:?}")),
    }
}

fn versions(tick: &pb::Tick) -> Result<Vec<Version>, BadTick> {
    let seq = tick.seq;
    let counted: u64 = tick.segs.iter().map(|seg| u64::from(seg.count)).sum();
    let (tokens, logprobs) = (tick.tokens.len(), tick.logprobs.len());
    if tokens as u64 != counted * WIDTH as u64 || logprobs != tokens {
        return Err(BadTick::Columns { seq, tokens, logprobs, counted });
    }
    let known = tick.versions.len();
    if let Some((segment, seg)) =
        tick.segs.iter().enumerate().find(|(_, seg)| seg.version_ix as usize >= known)
    {
        return Err(BadTick::VersionIndex { seq, segment, index: seg.version_ix, known });
    }
    let parse = |v: &pb::Version| {
        Version::try_from(v.clone()).map_err(|source| BadTick::Version { seq, source })
    };
    tick.versions.iter().map(parse).collect()
}

fn columns(tick: &pb::Tick) -> Result<Vec<(ColumnRecord, &[u8])>, BadTick> {
    let rows = (tick.tokens.len() / WIDTH) as u64;
    tick.columns.iter().map(|column| read_column(tick.seq, rows, column)).collect()
}

fn read_column(seq: u64, rows: u64, column: &pb::Column) -> Result<(ColumnRecord, &[u8]), BadTick> {
    let element = match column.dtype.as_str() {
        "u8" => 1,
        "u16" | "f16" | "bf16" => 2,
        _ => 4,
    };
    let row_bytes = element * column.width as usize;
    if column.data.len() as u64 != rows * row_bytes as u64 {
        let (name, bytes) = (column.name.clone(), column.data.len());
        return Err(BadTick::Extra { seq, name, bytes, rows, row_bytes });
    }
    let record = ColumnRecord {
        name: column.name.clone(),
        dtype: column.dtype.clone(),
        width: column.width,
        row_bytes,
        data: Vec::new(),
        complete: column.complete,
    };
    Ok((record, column.data.as_ref()))
}

fn put_columns(
    page: &mut Page,
    at: u32,
    columns: &[(ColumnRecord, &[u8])],
    rows: std::ops::Range<usize>,
) {
    for (record, data) in columns {
        let bytes = rows.start * record.row_bytes..rows.end * record.row_bytes;
        page.put_column(record, at, &data[bytes]);
    }
}
