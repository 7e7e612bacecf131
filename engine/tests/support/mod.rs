//! A running engine, a client for its streams, and the oracle's answer to compare with.
#![allow(dead_code, reason = "each test binary uses its part")]

use std::time::{Duration, Instant};

use anabranch_engine::synthetic::{Chain, SyntheticParams, WeightsKey, next};
use anabranch_engine::{EngineConfig, Server};
use futures_util::StreamExt;
use serde_json::{Value, json};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

pub const PARAMS: SyntheticParams = SyntheticParams { vocab: 32_000, eos_id: 2, mean_len: None };

pub struct Engine {
    pub url: String,
    pub client: reqwest::Client,
    stop: CancellationToken,
    task: Option<JoinHandle<()>>,
}

impl Engine {
    pub async fn start(config: EngineConfig) -> Self {
        let server = Server::bind(config).await.unwrap();
        let url = format!("http://{}", server.local_addr());
        let stop = CancellationToken::new();
        let run = server.run(stop.clone());
        let task = tokio::task::spawn_local(async { run.await.unwrap() });
        Self { url, client: reqwest::Client::new(), stop, task: Some(task) }
    }

    /// A client of an engine in another process.
    pub fn at(addr: &str) -> Self {
        let url = format!("http://{addr}");
        Self { url, client: reqwest::Client::new(), stop: CancellationToken::new(), task: None }
    }

    pub async fn synthetic(change: impl FnOnce(&mut EngineConfig)) -> Self {
        let mut config = EngineConfig::synthetic(PARAMS);
        config.faults = true;
        change(&mut config);
        Self::start(config).await
    }

    pub async fn stop(mut self) {
        self.stop.cancel();
        self.task.take().unwrap().await.unwrap();
    }

    pub async fn post(&self, path: &str, body: Value) -> (u16, Value) {
        let response = self
            .client
            .post(format!("{}{path}", self.url))
            .body(body.to_string())
            .send()
            .await
            .unwrap();
        let status = response.status().as_u16();
        let text = response.text().await.unwrap();
        (status, serde_json::from_str(&text).unwrap_or(Value::String(text)))
    }

    pub async fn get(&self, path: &str) -> (u16, Value) {
        let response = self.client.get(format!("{}{path}", self.url)).send().await.unwrap();
        let status = response.status().as_u16();
        let text = response.text().await.unwrap();
        (status, serde_json::from_str(&text).unwrap_or(Value::String(text)))
    }

    pub async fn stream(&self, body: Value) -> Stream {
        let response = self
            .client
            .post(format!("{}/generate", self.url))
            .body(body.to_string())
            .send()
            .await
            .unwrap();
        assert_eq!(response.status(), 200);
        Stream { body: Box::pin(response.bytes_stream()), buffer: Vec::new() }
    }

    pub async fn load(&self) -> Value {
        self.get("/v1/loads?include=core").await.1["loads"][0].clone()
    }

    /// Asks until the condition holds; fails after ten seconds.
    pub async fn wait_for(&self, what: &str, holds: impl Fn(&Value) -> bool) {
        let begun = Instant::now();
        while !holds(&self.load().await) {
            assert!(begun.elapsed() < Duration::from_secs(10), "waited in vain for: {what}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

#[derive(Debug, PartialEq)]
pub enum Event {
    Chunk(Value),
    Malformed(String),
    Done,
    /// The body ended as HTTP says it should.
    End,
    /// The connection broke.
    Broken,
}

pub struct Stream {
    body: std::pin::Pin<Box<dyn futures_util::Stream<Item = reqwest::Result<bytes::Bytes>>>>,
    buffer: Vec<u8>,
}

impl Stream {
    pub async fn next(&mut self) -> Event {
        loop {
            if let Some(at) = self.buffer.windows(2).position(|w| w == b"\n\n") {
                let event: Vec<u8> = self.buffer.drain(..at + 2).collect();
                let text = String::from_utf8(event).unwrap();
                let data =
                    text.trim_end().strip_prefix("data: ").unwrap_or(text.trim_end()).to_owned();
                return match serde_json::from_str(&data) {
                    _ if data == "[DONE]" => Event::Done,
                    Ok(value) => Event::Chunk(value),
                    Err(_) => Event::Malformed(data),
                };
            }
            match self.body.next().await {
                Some(Ok(bytes)) => self.buffer.extend_from_slice(&bytes),
                Some(Err(_)) => return Event::Broken,
                None => return Event::End,
            }
        }
    }

    pub async fn chunk(&mut self) -> Value {
        match self.next().await {
            Event::Chunk(value) => value,
            other => panic!("wanted a chunk, got {other:?}"),
        }
    }

    /// Every chunk up to the first event that is none, and that event.
    pub async fn rest(&mut self) -> (Vec<Value>, Event) {
        let mut chunks = Vec::new();
        loop {
            match self.next().await {
                Event::Chunk(value) => chunks.push(value),
                other => return (chunks, other),
            }
        }
    }
}

pub fn body(rid: &str, prompt: &[u32], seed: u64, new: u32) -> Value {
    json!({"rid": rid, "input_ids": prompt, "stream": true, "return_logprob": true,
        "sampling_params": {"max_new_tokens": new, "sampling_seed": seed}})
}

pub fn ids(chunks: &[Value]) -> Vec<u32> {
    let each = chunks.iter().flat_map(|chunk| chunk["output_ids"].as_array().unwrap());
    each.map(|id| id.as_u64().unwrap() as u32).collect()
}

pub fn logprobs(chunks: &[Value]) -> Vec<(f32, u32)> {
    let each = chunks
        .iter()
        .flat_map(|chunk| chunk["meta_info"]["output_token_logprobs"].as_array().unwrap());
    each.map(|row| (row[0].as_f64().unwrap() as f32, row[1].as_u64().unwrap() as u32)).collect()
}

/// What the oracle says: token and log-probability at each position, under the digest that held there.
pub fn oracle(
    params: SyntheticParams,
    seed: u64,
    prompt: &[u32],
    digests: &[[u8; 32]],
) -> Vec<(f32, u32)> {
    let mut chain = Chain::new(seed).extend(prompt);
    let each = digests.iter().map(|digest| {
        let made = next(chain, WeightsKey::new(digest), params, false);
        chain = chain.push(made.token);
        (made.logprob, made.token)
    });
    each.collect()
}
