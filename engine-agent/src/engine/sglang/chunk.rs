//! SGLang's stream: server-sent events to new tokens. Pure. One rule serves the cumulative and the
//! incremental form: new tokens are the tail of `output_ids`, as long as `completion_tokens` grew.

use std::borrow::Cow;

use serde::Deserialize;
use serde::de::IgnoredAny;

use crate::engine::{Chunk, Finish, LabelSpan, StreamError};

/// Splitter of a body into events. Bytes of an incomplete line wait in it.
#[derive(Debug, Default)]
pub struct Sse {
    partial: Vec<u8>,
}

/// Progress of one request: the number of tokens taken.
#[derive(Debug, Default)]
pub struct Decoder {
    have: u32,
}

// === impl Sse ===

impl Sse {
    /// Calls `event` with the payload of each `data:` line that `bytes` completes.
    pub fn feed<E>(
        &mut self,
        mut bytes: &[u8],
        mut event: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), SseError<E>> {
        while let Some(end) = memchr::memchr(b'\n', bytes) {
            let (line, rest) = (&bytes[..end], &bytes[end + 1..]);
            bytes = rest;
            if self.partial.is_empty() {
                payload(line).map_or(Ok(()), &mut event).map_err(SseError::Event)?;
            } else {
                self.partial.extend_from_slice(line);
                let line = std::mem::take(&mut self.partial);
                payload(&line).map_or(Ok(()), &mut event).map_err(SseError::Event)?;
            }
        }
        if self.partial.len() + bytes.len() > MAX_EVENT_BYTES {
            return Err(SseError::TooLong);
        }
        self.partial.extend_from_slice(bytes);
        Ok(())
    }
}

/// Longest event: a cumulative chunk of a 128k-token sample with log-probabilities stays below
/// this.
const MAX_EVENT_BYTES: usize = 64 << 20;

/// Failure while splitting.
#[derive(Debug)]
pub enum SseError<E> {
    /// The callback failed.
    Event(E),
    /// A line is too long.
    TooLong,
}

fn payload(line: &[u8]) -> Option<&[u8]> {
    let value = line.strip_prefix(b"data:")?;
    Some(value.strip_prefix(b" ").unwrap_or(value)).filter(|value| !value.is_empty())
}

/// True for the line that ends a stream; the line holds nothing.
pub fn is_done(payload: &[u8]) -> bool {
    payload.trim_ascii_end() == b"[DONE]"
}

// === impl Decoder ===

impl Decoder {
    /// Appends the tokens of the event `json` to `chunk`.
    pub fn decode(&mut self, json: &[u8], chunk: &mut Chunk) -> Result<(), StreamError> {
        let raw: RawChunk<'_> = serde_json::from_slice(json)
            .map_err(|error| malformed(format!("{error} in {}", excerpt(json))))?;
        if let Some(error) = raw.error {
            return Err(error.into_stream_error());
        }
        let meta = raw.meta_info.ok_or_else(|| malformed("a chunk without meta_info".into()))?;
        self.take(&raw.output_ids, &meta, chunk)?;
        chunk.usage.prompt_tokens = meta.prompt_tokens.unwrap_or(chunk.usage.prompt_tokens);
        chunk.usage.cached_tokens = meta.cached_tokens.unwrap_or(chunk.usage.cached_tokens);
        if let Some(label) = &meta.weight_version
            && *label != chunk.label
        {
            chunk.label = label.as_ref().to_owned();
        }
        if let Some(finish) = meta.finish_reason {
            chunk.finish = Some(finish.into_finish()?);
            let spans = meta.weight_versions.unwrap_or_default();
            chunk.spans.extend(spans.into_iter().map(RawSpan::into_span));
        }
        Ok(())
    }

    fn take(
        &mut self,
        ids: &[u32],
        meta: &RawMeta<'_>,
        chunk: &mut Chunk,
    ) -> Result<(), StreamError> {
        let total = meta.completion_tokens;
        let fresh = total.checked_sub(self.have).ok_or_else(|| {
            malformed(format!("completion_tokens fell from {} to {total}", self.have))
        })? as usize;
        let logprobs = tail(&meta.output_token_logprobs, fresh, "output_token_logprobs")?;
        // A queued abort repeats its last token and all its log-probabilities; what was not sent
        // before stands only beside the latter.
        let named = &ids[ids.len() - ids.len().min(fresh)..];
        let first_named = fresh - named.len();
        for (entry, id) in logprobs[first_named..].iter().zip(named) {
            if *id != entry.1 {
                return Err(malformed(format!("log-probability of {} beside token {id}", entry.1)));
            }
        }
        chunk.tokens.extend(logprobs.iter().map(|entry| entry.1));
        chunk.logprobs.extend(logprobs.iter().map(|entry| entry.0.unwrap_or(f32::NEG_INFINITY)));
        self.have = total;
        Ok(())
    }
}

fn tail<'a, T>(items: &'a [T], fresh: usize, name: &str) -> Result<&'a [T], StreamError> {
    let from = items.len().checked_sub(fresh).ok_or_else(|| {
        malformed(format!("{fresh} tokens are new, but {name} has {}", items.len()))
    })?;
    Ok(&items[from..])
}

#[derive(Deserialize)]
struct RawChunk<'a> {
    #[serde(default)]
    output_ids: Vec<u32>,
    #[serde(borrow)]
    meta_info: Option<RawMeta<'a>>,
    #[serde(borrow)]
    error: Option<RawError<'a>>,
}

#[derive(Deserialize)]
struct RawMeta<'a> {
    #[serde(borrow)]
    finish_reason: Option<RawFinish<'a>>,
    completion_tokens: u32,
    #[serde(default)]
    output_token_logprobs: Vec<LogprobEntry>,
    prompt_tokens: Option<u32>,
    cached_tokens: Option<u32>,
    #[serde(borrow)]
    weight_version: Option<Cow<'a, str>>,
    #[serde(borrow)]
    weight_versions: Option<Vec<RawSpan<'a>>>,
}

/// One entry, `[logprob, token id, text or null]`.
#[derive(Deserialize)]
struct LogprobEntry(
    Option<f32>,
    u32,
    #[serde(default)]
    #[allow(dead_code)]
    IgnoredAny,
);

#[derive(Deserialize)]
struct RawFinish<'a> {
    #[serde(borrow, rename = "type")]
    kind: Cow<'a, str>,
    #[serde(borrow, default)]
    matched: Option<Matched<'a>>,
    #[serde(borrow, default)]
    message: Option<Cow<'a, str>>,
    #[serde(default)]
    status_code: Option<u16>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Matched<'a> {
    Id(#[allow(dead_code)] u32),
    Text(#[serde(borrow)] Cow<'a, str>),
}

#[derive(Deserialize)]
struct RawSpan<'a> {
    #[serde(borrow)]
    version: Cow<'a, str>,
    start: u32,
    end: u32,
}

#[derive(Deserialize)]
struct RawError<'a> {
    #[serde(borrow, default)]
    message: Cow<'a, str>,
    #[serde(default)]
    code: Option<u16>,
}

impl RawFinish<'_> {
    fn into_finish(self) -> Result<Finish, StreamError> {
        match (self.kind.as_ref(), self.matched) {
            ("stop", Some(Matched::Text(text))) => Ok(Finish::StopString(text.into_owned())),
            ("stop", _) => Ok(Finish::StopId),
            ("length", _) => Ok(Finish::Length),
            ("abort", _) => match self.status_code {
                Some(code @ 400..=599) => Err(by_code(code, self.message.unwrap_or_default())),
                _ => Ok(Finish::Aborted),
            },
            (other, _) => Err(malformed(format!("unknown finish_reason {other:?}"))),
        }
    }
}

impl RawSpan<'_> {
    fn into_span(self) -> LabelSpan {
        LabelSpan { label: self.version.into_owned(), start: self.start, end: self.end }
    }
}

impl RawError<'_> {
    fn into_stream_error(self) -> StreamError {
        by_code(self.code.unwrap_or(500), self.message)
    }
}

/// The error of a status code. 429 and 408 are about the moment, not about the request.
pub(super) fn by_code(code: u16, message: Cow<'_, str>) -> StreamError {
    let message = message.into_owned();
    match code {
        400..=499 if code != 429 && code != 408 => StreamError::Refused { code, message },
        _ => StreamError::Failed { code, message },
    }
}

fn malformed(what: String) -> StreamError {
    StreamError::Malformed { what }
}

fn excerpt(json: &[u8]) -> String {
    let shown = &json[..json.len().min(120)];
    format!("{:?}", String::from_utf8_lossy(shown))
}

impl From<SseError<StreamError>> for StreamError {
    fn from(error: SseError<StreamError>) -> Self {
        match error {
            SseError::Event(error) => error,
            SseError::TooLong => {
                malformed(format!("a line longer than {} MiB", MAX_EVENT_BYTES >> 20))
            }
        }
    }
}

#[cfg(test)]
mod tests;
