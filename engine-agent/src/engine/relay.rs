//! A stand-in for an engine in a relay: a process that fetches versions only to serve them to
//! receivers that cannot reach the trainer, or are many. Takes every load and generates nothing.

use std::path::Path;
use std::sync::{Mutex, MutexGuard};

use anabranch_proto::{Caps, LogprobsMode, Model, SeedKeying};

use super::{
    Chunk, Engine, EngineError, EngineInfo, Finish, Generate, StreamError, TokenStream, Utilization,
};

/// Kind of this engine in Hello; the manager places no sample on it.
pub const KIND: &str = "relay";

/// Takes loads and remembers their label.
#[derive(Debug, Default)]
pub struct Relay {
    label: Mutex<String>,
}

/// A stream that ends at once, without tokens.
pub struct Nothing;

impl Relay {
    fn label(&self) -> MutexGuard<'_, String> {
        self.label.lock().expect("held only to copy")
    }
}

impl Engine for Relay {
    type Stream = Nothing;

    async fn info(&self) -> Result<EngineInfo, EngineError> {
        let caps = Caps::new(SeedKeying::Unkeyed, LogprobsMode::ALL.to_vec());
        Ok(EngineInfo {
            kind: KIND.to_owned(),
            model: Model::default(),
            caps,
            kv_tokens: 0,
            max_running: 0,
            incremental: true,
            model_directory: None,
            weight_label: self.label().clone(),
        })
    }

    async fn alive(&self) -> Result<String, EngineError> {
        Ok(self.label().clone())
    }

    async fn utilization(&self) -> Result<Utilization, EngineError> {
        Ok(Utilization::default())
    }

    /// Answers the probe. The answer is empty, which agrees with that of every other relay.
    async fn generate(&self, _request: &Generate) -> Result<Nothing, StreamError> {
        Ok(Nothing)
    }

    async fn abort(&self, _rid: &str) -> Result<(), EngineError> {
        Ok(())
    }

    async fn pause(&self) -> Result<(), EngineError> {
        Ok(())
    }

    async fn continue_generation(&self) -> Result<(), EngineError> {
        Ok(())
    }

    async fn load(&self, _directory: &Path, label: &str) -> Result<(), EngineError> {
        label.clone_into(&mut self.label());
        Ok(())
    }

    async fn flush(&self) -> Result<(), EngineError> {
        Ok(())
    }

    async fn release_memory(&self) -> Result<(), EngineError> {
        Ok(())
    }

    async fn resume_memory(&self) -> Result<(), EngineError> {
        Ok(())
    }
}

impl TokenStream for Nothing {
    async fn next(&mut self, chunk: &mut Chunk) -> Result<(), StreamError> {
        chunk.clear();
        chunk.finish = Some(Finish::Length);
        Ok(())
    }

    async fn close(&mut self) {}
}
