//! The stream of one `/generate`: bytes in, chunks out.

use super::chunk::{Decoder, Sse, is_done};
use super::*;

/// Tokens of one request to SGLang.
pub struct SglangStream {
    /// The answer; `None` once its connection went back to the pool.
    reply: Option<Reply>,
    sse: Sse,
    decoder: Decoder,
}

impl SglangStream {
    pub(super) fn new(reply: Reply) -> SglangStream {
        SglangStream { reply: Some(reply), sse: Sse::default(), decoder: Decoder::default() }
    }

    /// Reads the rest after the finish, which is only `[DONE]`; a server that sends more loses the
    /// connection.
    async fn finish(&mut self) {
        let Some(mut reply) = self.reply.take() else { return };
        let ended = timeout(LAST_LINE, async {
            while let Ok(Some(rest)) = reply.chunk().await {
                if rest.len() > MAX_LAST_LINE_BYTES {
                    return false;
                }
            }
            true
        });
        if ended.await == Ok(true) {
            reply.keep().await;
        }
    }
}

/// Time for the rest after the finish.
const LAST_LINE: std::time::Duration = std::time::Duration::from_millis(500);
/// Most bytes after the finish.
const MAX_LAST_LINE_BYTES: usize = 1024;

impl TokenStream for SglangStream {
    async fn next(&mut self, chunk: &mut Chunk) -> Result<(), StreamError> {
        chunk.clear();
        loop {
            let reply = self.reply.as_mut().ok_or(StreamError::CleanEnd)?;
            let Some(bytes) = reply.chunk().await.map_err(lost)? else {
                return Err(StreamError::CleanEnd);
            };
            let decoder = &mut self.decoder;
            let mut events = 0;
            self.sse.feed(&bytes, |payload| {
                if is_done(payload) || chunk.finish.is_some() {
                    return Ok(());
                }
                events += 1;
                decoder.decode(payload, chunk)
            })?;
            if chunk.finish.is_some() {
                return Ok(());
            }
            if events > 0 {
                return Ok(());
            }
        }
    }

    async fn close(&mut self) {
        self.finish().await;
    }
}
