//! One request at the engine, from its start to its terminal chunk. The core decides where tokens
//! belong, at the moment they are handed over.

use std::sync::Arc;

use crate::core::{AfterChunk, Event, RequestEnd};
use crate::engine::{AttemptId, Chunk, Engine, Generate, StreamError, TokenStream};
use crate::shared::Shared;

/// Runs one request and reports its end.
pub async fn stream_task<E: Engine>(shared: Arc<Shared>, engine: Arc<E>, request: Box<Generate>) {
    let attempt = request.attempt;
    let end = match engine.generate(&request).await {
        Ok(stream) => pump(&shared, stream, attempt).await,
        Err(error) => Some(RequestEnd::Failed(error)),
    };
    shared.stream_ended(attempt);
    if let Some(end) = end {
        shared.handle(Event::RequestEnded { attempt, end });
    }
}

/// Hands every chunk to the core. `None` if nobody waits for the end.
async fn pump(
    shared: &Shared,
    mut stream: impl TokenStream,
    attempt: AttemptId,
) -> Option<RequestEnd> {
    let mut chunk = Chunk::default();
    loop {
        let next = stream.next(&mut chunk).await;
        // Chunks that came before an error in the same read are good.
        if shared.tokens(attempt, &chunk) == AfterChunk::Close {
            return None;
        }
        if let Err(error) = next {
            return Some(RequestEnd::Failed(error));
        }
        if let Some(finish) = chunk.finish.take() {
            stream.close().await;
            let usage = chunk.usage;
            return Some(RequestEnd::Finished {
                finish,
                prompt_tokens: usage.prompt_tokens,
                cached_tokens: usage.cached_tokens,
            });
        }
    }
}

/// Collects all tokens of a request in memory, for the probe.
pub async fn collect<E: Engine>(
    engine: &E,
    request: &Generate,
) -> Result<(Vec<u32>, Vec<f32>), StreamError> {
    let mut stream = engine.generate(request).await?;
    let (mut tokens, mut logprobs) = (Vec::new(), Vec::new());
    let mut chunk = Chunk::default();
    loop {
        stream.next(&mut chunk).await?;
        tokens.extend_from_slice(&chunk.tokens);
        logprobs.extend_from_slice(&chunk.logprobs);
        if chunk.finish.take().is_some() {
            stream.close().await;
            return Ok((tokens, logprobs));
        }
    }
}
