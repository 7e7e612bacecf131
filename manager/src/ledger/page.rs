//! One sample's page: its tokens and log-probabilities as columns, and spans that tile them.
//!
//! ```text
//! Open ──append──▶ Open ──stop condition, or the engine's finish──▶ Finished
//!   ▲  └─begin(attempt)─┘
//!   └──clear (restart from the prompt)
//! ```

use std::sync::Arc;

use anabranch_proto::tokens::{self, WIDTH};
use anabranch_proto::{Attempt, Version};
use bytes::{Bytes, BytesMut};

use super::rules::Verdict;
use super::{Finished, Maker, StopRules};

pub(super) struct Page {
    rules: Arc<StopRules>,
    tokens: BytesMut,
    logprobs: BytesMut,
    spans: Vec<SpanRecord>,
    columns: Vec<ColumnRecord>,
    attempt: Attempt,
    maker: Option<Arc<Maker>>,
    finished: Option<Finished>,
}

/// Maker and weights of the tokens [start, start + len).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpanRecord {
    pub start: u32,
    pub len: u32,
    pub maker: Arc<Maker>,
    pub version: Version,
    pub exact: bool,
    pub kv_recomputed: bool,
}

/// A per-token extra; rows that were lost with their engine are zero and `complete` is false.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ColumnRecord {
    pub name: String,
    pub dtype: String,
    pub width: u32,
    pub row_bytes: usize,
    pub data: Vec<u8>,
    pub complete: bool,
}

/// A page's content, for a trajectory.
#[derive(Clone, Debug)]
pub struct PageView {
    pub tokens: Bytes,
    pub logprobs: Bytes,
    pub spans: Vec<SpanRecord>,
    pub columns: Vec<ColumnRecord>,
}

/// A segment of a tick, already cut out of its columns.
pub(super) struct Piece<'a> {
    pub attempt: Attempt,
    pub offset: u32,
    pub tokens: &'a [u8],
    pub logprobs: &'a [u8],
    pub version: Version,
    pub exact: bool,
    pub kv_recomputed: bool,
}

#[derive(Debug, PartialEq)]
pub(super) enum Appended {
    /// The tokens are of an attempt that had been moved on, or come after the end.
    Stale,
    Grew {
        new: u32,
        repeated: u32,
    },
    Finished {
        new: u32,
        repeated: u32,
        past_stop: u32,
    },
    /// The engine's weights moved on under a pinned sample: not its fault, but not its tokens either.
    PastPin(String),
    Broken(String),
}

impl Page {
    pub(super) fn new(rules: Arc<StopRules>) -> Self {
        Self {
            rules,
            tokens: BytesMut::new(),
            logprobs: BytesMut::new(),
            spans: Vec::new(),
            columns: Vec::new(),
            attempt: Attempt(0),
            maker: None,
            finished: None,
        }
    }

    pub(super) fn kept(&self) -> u32 {
        (self.tokens.len() / WIDTH) as u32
    }

    pub(super) fn is_finished(&self) -> bool {
        self.finished.is_some()
    }

    pub(super) fn finished(&self) -> Option<&Finished> {
        self.finished.as_ref()
    }

    pub(super) fn is_current(&self, attempt: Attempt) -> bool {
        self.attempt == attempt && self.maker.is_some()
    }

    pub(super) fn spans(&self) -> &[SpanRecord] {
        &self.spans
    }

    pub(super) fn begin(&mut self, attempt: Attempt, maker: Arc<Maker>) -> Bytes {
        self.attempt = attempt;
        self.maker = Some(maker);
        Bytes::copy_from_slice(&self.tokens)
    }

    /// The attempt is over; what still comes of it is stale.
    pub(super) fn end_attempt(&mut self) {
        self.maker = None;
    }

    pub(super) fn finish(&mut self, how: Finished) {
        self.finished = Some(how);
    }

    pub(super) fn clear(&mut self) -> u32 {
        let had = self.kept();
        self.tokens.clear();
        self.logprobs.clear();
        self.spans.clear();
        self.columns.clear();
        self.end_attempt();
        had
    }

    pub(super) fn view(&self) -> PageView {
        PageView {
            tokens: Bytes::copy_from_slice(&self.tokens),
            logprobs: Bytes::copy_from_slice(&self.logprobs),
            spans: self.spans.clone(),
            columns: self.columns.clone(),
        }
    }

    /// Adds what is new of a piece. A piece may repeat what is there (a tick sent again after a re-attach);
    /// it must never leave a gap.
    pub(super) fn append(&mut self, piece: &Piece<'_>) -> Appended {
        if !self.is_current(piece.attempt) || self.is_finished() {
            return Appended::Stale;
        }
        let kept = self.kept();
        let Some(skip) = kept.checked_sub(piece.offset) else {
            return Appended::Broken(format!(
                "gap: has {kept} tokens, got offset {}",
                piece.offset
            ));
        };
        if self.rules.pin.is_some_and(|pin| pin != piece.version) {
            return Appended::PastPin(format!("pinned sample got tokens of {}", piece.version));
        }
        let count = (piece.tokens.len() / WIDTH) as u32;
        let skip = skip.min(count);
        let from = skip as usize * WIDTH;
        match self.judge(&piece.tokens[from..], &piece.logprobs[from..]) {
            Err(what) => Appended::Broken(what),
            Ok((take, finish)) => {
                self.push(piece, from, take);
                match finish {
                    None => Appended::Grew { new: take, repeated: skip },
                    Some(how) => {
                        self.finished = Some(how);
                        let past_stop = count - skip - take;
                        Appended::Finished { new: take, repeated: skip, past_stop }
                    }
                }
            }
        }
    }

    /// Rows of a column for tokens [at, at + rows).
    pub(super) fn put_column(&mut self, like: &ColumnRecord, at: u32, rows: &[u8]) {
        let kept = self.kept() as usize;
        let column = match self.columns.iter_mut().position(|column| column.name == like.name) {
            Some(index) => &mut self.columns[index],
            None => {
                self.columns.push(ColumnRecord { data: Vec::new(), ..like.clone() });
                self.columns.last_mut().expect("just pushed")
            }
        };
        let start = at as usize * column.row_bytes;
        if column.data.len() < start {
            column.complete = false;
            column.data.resize(start, 0);
        }
        column.data.truncate(start);
        column.data.extend_from_slice(rows);
        column.data.truncate(kept * column.row_bytes);
        column.complete &= like.complete;
    }

    /// How many of the new tokens count, and whether the last of them ends the sample.
    fn judge(&self, ids: &[u8], logprobs: &[u8]) -> Result<(u32, Option<Finished>), String> {
        let mut count = self.kept();
        let mut take = 0;
        for (id, logprob) in tokens::ids(ids).zip(tokens::logprobs(logprobs)) {
            if logprob.is_nan() {
                return Err(format!("log-probability of token {count} is not a number"));
            }
            count += 1;
            take += 1;
            match self.rules.judge(id, count) {
                Verdict::GoOn => {}
                Verdict::StopId(id) => return Ok((take, Some(Finished::Stop(id.to_string())))),
                Verdict::Length => return Ok((take, Some(Finished::Length))),
                Verdict::Foreign(id) => {
                    return Err(format!(
                        "token {id} is outside the vocabulary of {}",
                        self.rules.vocab
                    ));
                }
            }
        }
        Ok((take, None))
    }

    fn push(&mut self, piece: &Piece<'_>, from: usize, take: u32) {
        if take == 0 {
            return;
        }
        let start = self.kept();
        let to = from + take as usize * WIDTH;
        self.tokens.extend_from_slice(&piece.tokens[from..to]);
        self.logprobs.extend_from_slice(&piece.logprobs[from..to]);
        let maker = self.maker.as_ref().expect("append checked that the attempt is current");
        match self.spans.last_mut() {
            Some(last)
                if Arc::ptr_eq(&last.maker, maker)
                    && last.version == piece.version
                    && last.exact == piece.exact
                    && last.kv_recomputed == piece.kv_recomputed =>
            {
                last.len += take;
            }
            _ => self.spans.push(SpanRecord {
                start,
                len: take,
                maker: maker.clone(),
                version: piece.version,
                exact: piece.exact,
                kv_recomputed: piece.kv_recomputed,
            }),
        }
    }
}
