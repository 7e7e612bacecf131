//! The body of `/generate`, written straight from token columns: a prompt may have a million ids.

use anabranch_proto::Sampling;
use bytes::Bytes;
use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};

use crate::engine::Generate;

pub(super) fn body(request: &Generate, incremental: bool) -> Bytes {
    let body = Body {
        rid: &request.rid,
        input_ids: Ids { head: &request.prompt, tail: &request.tail },
        sampling_params: Params { request, incremental },
        stream: true,
        return_logprob: true,
        logprob_start_len: -1,
    };
    serde_json::to_vec(&body).expect("plain structs serialise").into()
}

#[derive(Serialize)]
struct Body<'a> {
    rid: &'a str,
    input_ids: Ids<'a>,
    sampling_params: Params<'a>,
    stream: bool,
    return_logprob: bool,
    /// Log-probabilities of the prompt: none.
    logprob_start_len: i32,
}

struct Ids<'a> {
    head: &'a [u32],
    tail: &'a [u32],
}

impl Serialize for Ids<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.head.iter().chain(self.tail))
    }
}

struct Params<'a> {
    request: &'a Generate,
    incremental: bool,
}

impl Serialize for Params<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Generate { sampling, max_tokens, min_tokens, stop_ids, seed, .. } = self.request;
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("max_new_tokens", max_tokens)?;
        map.serialize_entry("min_new_tokens", min_tokens)?;
        map.serialize_entry("temperature", &sampling.temperature)?;
        map.serialize_entry("top_p", &sampling.top_p)?;
        map.serialize_entry("top_k", &top_k(sampling))?;
        map.serialize_entry("min_p", &sampling.min_p)?;
        map.serialize_entry("stop_token_ids", stop_ids.as_ref())?;
        map.serialize_entry("ignore_eos", &sampling.ignore_eos)?;
        map.serialize_entry("no_stop_trim", &true)?;
        map.serialize_entry("skip_special_tokens", &false)?;
        if !sampling.stop_strings.is_empty() {
            map.serialize_entry("stop", &sampling.stop_strings)?;
        }
        if sampling.presence_penalty != 0.0 {
            map.serialize_entry("presence_penalty", &sampling.presence_penalty)?;
        }
        if sampling.frequency_penalty != 0.0 {
            map.serialize_entry("frequency_penalty", &sampling.frequency_penalty)?;
        }
        map.serialize_entry("repetition_penalty", &sampling.repetition_penalty)?;
        if let Some(seed) = seed {
            map.serialize_entry("sampling_seed", seed)?;
        }
        if !self.incremental {
            map.serialize_entry("stream_interval", &cumulative_interval(*max_tokens))?;
        }
        for (key, value) in &sampling.extra {
            map.serialize_entry(key, &Extra(value))?;
        }
        map.end()
    }
}

/// SGLang's `top_k`: -1 is off, which is 0 on our wire.
fn top_k(sampling: &Sampling) -> i64 {
    match sampling.top_k {
        0 => -1,
        k => i64::from(k),
    }
}

/// Interval between chunks of a cumulative stream. Each chunk repeats all that came before, so
/// bytes grow with the square of the length over the interval: 64 chunks at most keep them near 32
/// times the final chunk.
pub(super) fn cumulative_interval(max_tokens: u32) -> u32 {
    max_tokens.div_ceil(64).max(8)
}

/// A value of `extra`: JSON if it parses as JSON, text otherwise.
struct Extra<'a>(&'a str);

impl Serialize for Extra<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match serde_json::from_str::<serde_json::Value>(self.0) {
            Ok(value) => value.serialize(serializer),
            Err(_) => serializer.serialize_str(self.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::engine::AttemptId;

    fn request(sampling: Sampling) -> Generate {
        Generate {
            attempt: AttemptId(1),
            rid: "ab-1".into(),
            prompt: Arc::from([1, 2]),
            tail: vec![3],
            sampling: Arc::new(sampling),
            max_tokens: 640,
            min_tokens: 2,
            stop_ids: Arc::from([9]),
            seed: Some(7),
        }
    }

    fn json(request: &Generate, incremental: bool) -> serde_json::Value {
        serde_json::from_slice(&body(request, incremental)).expect("json")
    }

    #[test]
    fn prompt_and_tail_are_one_input_and_extras_keep_their_type() {
        let extra = [("a".to_owned(), "1".to_owned()), ("b".to_owned(), "x y".to_owned())];
        let sampling = Sampling { extra: extra.into(), top_k: 4, ..Default::default() };
        let json = json(&request(sampling), true);
        assert_eq!(json["input_ids"], serde_json::json!([1, 2, 3]));
        let params = &json["sampling_params"];
        assert_eq!((&params["a"], &params["b"]), (&1.into(), &"x y".into()));
        assert_eq!((&params["top_k"], &params["sampling_seed"]), (&4.into(), &7.into()));
        assert!(params.get("stream_interval").is_none());
    }

    #[test]
    fn a_cumulative_server_is_asked_for_an_interval_that_grows_with_the_length() {
        let request = request(Sampling::default());
        assert_eq!(json(&request, false)["sampling_params"]["stream_interval"], 10);
        assert_eq!(cumulative_interval(16), 8);
        assert_eq!(cumulative_interval(65536), 1024);
    }
}
