//! The JSON of `/generate` in SGLang's shape, written by hand into a buffer that is used again for every chunk:
//! at a thousand streams this is most of what the engine does. Owns no socket.

use crate::step::{End, Mark, Seq};

/// Settings by which one chunk is written.
#[derive(Clone, Copy)]
pub(crate) struct Shape<'a> {
    pub incremental: bool,
    /// The engine's label at this moment; the final chunk uses its last span's.
    pub label: &'a str,
    /// True to leave out the finish after the last tokens, for the fault `lose_finish`.
    pub hide_end: bool,
}

const DONE: &[u8] = b"data: [DONE]\n\n";

/// Writes one server-sent event; the final one is followed by `[DONE]`.
pub(crate) fn write_event<S>(buf: &mut Vec<u8>, seq: &Seq<S>, end: Option<&End>, shape: Shape<'_>) {
    buf.extend_from_slice(b"data: ");
    let end = end.filter(|_| !shape.hide_end);
    write_object(buf, seq, end, shape);
    buf.extend_from_slice(b"\n\n");
    if end.is_some() {
        buf.extend_from_slice(DONE);
    }
}

pub(crate) fn write_object<S>(
    buf: &mut Vec<u8>,
    seq: &Seq<S>,
    end: Option<&End>,
    shape: Shape<'_>,
) {
    let queued = matches!(end, Some(End::Abort { queued: true, .. }));
    let from = if shape.incremental { seq.sent } else { 0 };
    // SGLang repeats the last token and all log-probabilities when it aborts a queued or retracted request.
    let (ids_from, logprobs_from) = if queued && shape.incremental {
        (seq.tokens.len().saturating_sub(1), 0)
    } else {
        (from, from)
    };
    buf.extend_from_slice(b"{\"text\":\"\",\"output_ids\":");
    write_ids(buf, &seq.tokens[ids_from..]);
    buf.extend_from_slice(b",\"meta_info\":{\"id\":");
    write_text(buf, &seq.request.rid);
    buf.extend_from_slice(b",\"finish_reason\":");
    write_end(buf, end, seq.tokens.len());
    if !queued {
        buf.extend_from_slice(b",\"prompt_tokens\":");
        write_int(buf, seq.request.prompt.len());
        buf.extend_from_slice(b",\"cached_tokens\":0,\"cached_tokens_details\":null");
    }
    buf.extend_from_slice(b",\"weight_version\":");
    write_text(buf, last_label(seq, end, shape.label));
    buf.extend_from_slice(b",\"num_retractions\":");
    write_int(buf, seq.retractions as usize);
    if seq.request.return_logprob {
        buf.extend_from_slice(b",\"input_token_logprobs\":[],\"output_token_logprobs\":");
        write_logprobs(buf, &seq.logprobs[logprobs_from..], &seq.tokens[logprobs_from..]);
        buf.extend_from_slice(b",\"output_token_logprobs_length\":");
        write_int(buf, seq.tokens.len());
    }
    if seq.request.return_extra {
        buf.extend_from_slice(b",\"output_extra\":");
        write_ids(buf, &seq.extras[logprobs_from..]);
    }
    if end.is_some() {
        buf.extend_from_slice(b",\"weight_versions\":");
        write_spans(buf, &seq.marks, seq.tokens.len());
    }
    buf.extend_from_slice(b",\"reasoning_tokens\":0,\"completion_tokens\":");
    write_int(buf, seq.tokens.len());
    buf.extend_from_slice(b",\"dp_rank\":null},\"index\":0}");
}

/// Error in SGLang's form inside a stream: HTTP 200, one event, then `[DONE]`.
pub(crate) fn error_event(message: &str, code: u16) -> Vec<u8> {
    let mut buf = b"data: ".to_vec();
    buf.extend_from_slice(error_json(message, code).as_bytes());
    buf.extend_from_slice(b"\n\n");
    buf.extend_from_slice(DONE);
    buf
}

pub(crate) fn error_json(message: &str, code: u16) -> String {
    let kind = if code < 500 { "invalid_request_error" } else { "internal_error" };
    let retryable = code == 503;
    serde_json::json!({"error": {"message": message, "type": kind, "code": code, "retryable": retryable}}).to_string()
}

fn last_label<'a, S>(seq: &'a Seq<S>, end: Option<&End>, now: &'a str) -> &'a str {
    match (end, seq.marks.last()) {
        (Some(_), Some(mark)) => &mark.label,
        _ => now,
    }
}

fn write_end(buf: &mut Vec<u8>, end: Option<&End>, len: usize) {
    match end {
        None => buf.extend_from_slice(b"null"),
        Some(End::Stop { matched }) => {
            buf.extend_from_slice(b"{\"type\":\"stop\",\"matched\":");
            write_int(buf, *matched as usize);
            buf.push(b'}');
        }
        Some(End::Length) => {
            buf.extend_from_slice(b"{\"type\":\"length\",\"length\":");
            write_int(buf, len);
            buf.push(b'}');
        }
        Some(End::Abort { message, queued }) => {
            buf.extend_from_slice(b"{\"type\":\"abort\",\"message\":");
            write_text(buf, message);
            if !queued {
                buf.extend_from_slice(b",\"status_code\":null,\"err_type\":null");
            }
            buf.push(b'}');
        }
    }
}

fn write_spans(buf: &mut Vec<u8>, marks: &[Mark], len: usize) {
    buf.push(b'[');
    for (i, mark) in marks.iter().enumerate() {
        if i > 0 {
            buf.push(b',');
        }
        buf.extend_from_slice(b"{\"version\":");
        write_text(buf, &mark.label);
        buf.extend_from_slice(b",\"start\":");
        write_int(buf, mark.start as usize);
        buf.extend_from_slice(b",\"end\":");
        write_int(buf, marks.get(i + 1).map_or(len, |next| next.start as usize));
        buf.push(b'}');
    }
    buf.push(b']');
}

fn write_logprobs(buf: &mut Vec<u8>, logprobs: &[f32], tokens: &[u32]) {
    let mut float = ryu::Buffer::new();
    let mut int = itoa::Buffer::new();
    buf.push(b'[');
    for (i, (logprob, token)) in logprobs.iter().zip(tokens).enumerate() {
        buf.extend_from_slice(if i > 0 { b",[" } else { b"[" });
        buf.extend_from_slice(float.format_finite(*logprob).as_bytes());
        buf.push(b',');
        buf.extend_from_slice(int.format(*token).as_bytes());
        buf.extend_from_slice(b",null]");
    }
    buf.push(b']');
}

fn write_ids(buf: &mut Vec<u8>, ids: &[u32]) {
    let mut int = itoa::Buffer::new();
    buf.push(b'[');
    for (i, id) in ids.iter().enumerate() {
        if i > 0 {
            buf.push(b',');
        }
        buf.extend_from_slice(int.format(*id).as_bytes());
    }
    buf.push(b']');
}

fn write_int(buf: &mut Vec<u8>, value: usize) {
    buf.extend_from_slice(itoa::Buffer::new().format(value).as_bytes());
}

fn write_text(buf: &mut Vec<u8>, text: &str) {
    let plain = text.bytes().all(|b| b >= 0x20 && b != b'"' && b != b'\\');
    if plain {
        buf.push(b'"');
        buf.extend_from_slice(text.as_bytes());
        buf.push(b'"');
    } else {
        serde_json::to_writer(buf, text).expect("a string always serialises into memory");
    }
}
