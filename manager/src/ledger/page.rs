//! One sample's page: its tokens and log-probabilities as columns, and spans that tile them.
//!
//! ```text
//! Open ──append──▶ Open ──stop condition, the engine's finish, freeze──▶ Finished
//!   ▲  └─begin(attempt)─┘
//!   └──clear (restart from the prompt)
//! ```

use std::sync::Arc;

use anabranch_proto::tokens::{self, WIDTH};
use anabranch_proto::{Attempt, SessionId, Version};
use anabranch_runtime::clock::Now;
use bytes::{Bytes, BytesMut};

use super::rules::Verdict;
use super::{Finished, Maker, StopRules};

/// The core is told of growth where the tokens are so many times what it was told before.
const TELLS_AT_TIMES: u32 = 2;

pub(super) struct Page {
    rules: Arc<StopRules>,
    tokens: BytesMut,
    logprobs: BytesMut,
    spans: Vec<SpanRecord>,
    columns: Vec<ColumnRecord>,
    attempt: Attempt,
    maker: Option<Arc<Maker>>,
    finished: Option<Finished>,
    /// Lowest version number among the tokens; `u64::MAX` without tokens.
    oldest: u64,
    /// When the attempt began or last made a token.
    progress: Now,
    /// True once the attempt has made a token.
    had_token: bool,
    /// Tokens and oldest version as the core was last told.
    told: (u32, u64),
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
    pub session: SessionId,
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
    /// The tokens are from a session that does not run the sample.
    Foreign,
    /// `tell`: the core is to hear of it.
    Grew {
        new: u32,
        repeated: u32,
        tell: bool,
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
            oldest: u64::MAX,
            progress: Now::ZERO,
            had_token: false,
            told: (0, u64::MAX),
        }
    }

    /// Lowest version number among the tokens; `u64::MAX` without tokens.
    pub(super) fn oldest(&self) -> u64 {
        self.oldest
    }

    /// When the running attempt began or last made a token, and whether it has made one.
    pub(super) fn progress(&self) -> (Now, bool) {
        (self.progress, self.had_token)
    }

    /// The session that runs `attempt`, where that is the page's and not over.
    pub(super) fn runs_on(&self, attempt: Attempt) -> Option<SessionId> {
        let maker = self.maker.as_ref().filter(|_| !self.is_finished())?;
        (self.attempt == attempt).then_some(maker.session)
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

    pub(super) fn begin(&mut self, now: Now, attempt: Attempt, maker: Arc<Maker>) -> Bytes {
        self.attempt = attempt;
        self.maker = Some(maker);
        (self.progress, self.had_token) = (now, false);
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
        (self.oldest, self.told) = (u64::MAX, (0, u64::MAX));
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
    pub(super) fn append(&mut self, now: Now, piece: &Piece<'_>) -> Appended {
        match self.runs_on(piece.attempt) {
            None => return Appended::Stale,
            Some(session) if session != piece.session => return Appended::Foreign,
            Some(_) => {}
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
                let first = take > 0 && !self.had_token;
                self.push(now, piece, from, take);
                match finish {
                    None => {
                        let tell = self.tells(first);
                        Appended::Grew { new: take, repeated: skip, tell }
                    }
                    Some(how) => {
                        self.finished = Some(how);
                        let past_stop = count - skip - take;
                        Appended::Finished { new: take, repeated: skip, past_stop }
                    }
                }
            }
        }
    }

    /// True where the core is to hear of growth; `first`: of the attempt.
    fn tells(&mut self, first: bool) -> bool {
        let (kept, oldest) = self.told;
        let tell = first || oldest != self.oldest || self.kept() / TELLS_AT_TIMES >= kept.max(1);
        if tell {
            self.told = (self.kept(), self.oldest);
        }
        tell
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

    fn push(&mut self, now: Now, piece: &Piece<'_>, from: usize, take: u32) {
        if take == 0 {
            return;
        }
        (self.progress, self.had_token) = (now, true);
        self.oldest = self.oldest.min(piece.version.number);
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
