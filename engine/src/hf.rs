//! The `hf:DIR` model: a checkpoint of the Llama family on the CPU. Joins config, weights, decoder and sampling to
//! the scheduler's [`Model`]; computes in f32 on one thread.

use std::cell::OnceCell;
use std::path::Path;
use std::sync::Arc;

use crate::config::{EngineConfig, EngineError};
use crate::http::ModelFacts;
use crate::model::{Lane, Loader, Made, Model, ModelError, Sampling};

mod config;
mod decoder;
mod load;
mod sample;
#[cfg(test)]
mod tests;

use config::HfConfig;
use decoder::{Decoder, Feed, KvCache};
use load::HfWeights;
use sample::Choice;

pub(crate) struct Hf {
    decoder: Decoder,
    weights: Option<HfWeights>,
    digest: [u8; 32],
    original_logprob: bool,
}

pub(crate) struct HfKv {
    cache: KvCache,
    sampling: Arc<Sampling>,
    seed: u64,
}

impl Hf {
    /// Loads the model of `dir`; returns it with its facts and its context length.
    pub fn open(dir: &Path, config: &EngineConfig) -> Result<(Self, ModelFacts, u32), EngineError> {
        let hf = HfConfig::read(dir)
            .map_err(|reason| EngineError::Model { dir: dir.to_owned(), reason })?;
        let weights = load::load(&hf, dir)?;
        let facts = ModelFacts {
            name: dir.file_name().map_or_else(
                || dir.display().to_string(),
                |name| name.to_string_lossy().into_owned(),
            ),
            kind: hf.kind().to_owned(),
            architecture: hf.architecture.clone(),
            vocab: hf.vocab as u32,
            eos_ids: hf.eos.clone(),
        };
        let context = hf.context;
        let model = Self {
            decoder: Decoder::new(hf),
            digest: weights.digest,
            weights: Some(weights),
            original_logprob: config.return_original_logprob,
        };
        Ok((model, facts, context))
    }

    fn pass(
        &mut self,
        feeds: &mut [Feed<'_>],
        logits: bool,
    ) -> Result<Option<Vec<f32>>, ModelError> {
        stay_on_this_thread()?;
        let weights = self
            .weights
            .as_ref()
            .ok_or_else(|| ModelError("its weights were released".to_owned()))?;
        self.decoder.forward(weights, feeds, logits).map_err(|error| ModelError(error.to_string()))
    }
}

thread_local! {
    static POOL: OnceCell<rayon::ThreadPool> = const { OnceCell::new() };
}

/// Makes this thread a pool of its own, so that gemm stays on it whatever `RAYON_NUM_THREADS` says.
fn stay_on_this_thread() -> Result<(), ModelError> {
    if rayon::current_thread_index().is_some() {
        return Ok(());
    }
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).use_current_thread().build();
    let pool = pool.map_err(|error| ModelError(error.to_string()))?;
    // It was in no pool just now, so the cell is empty.
    let _ = POOL.with(|cell| cell.set(pool));
    Ok(())
}

impl Model for Hf {
    type Kv = HfKv;
    type Weights = HfWeights;

    fn vocab(&self) -> u32 {
        self.decoder.config().vocab as u32
    }

    fn eos_ids(&self) -> &[u32] {
        &self.decoder.config().eos
    }

    fn rounds_per_step(&self) -> u32 {
        1
    }

    fn digest(&self) -> [u8; 32] {
        self.digest
    }

    fn loader(&self) -> Loader<HfWeights> {
        let config = self.decoder.config().clone();
        Arc::new(move |dir| load::load(&config, dir))
    }

    fn swap(&mut self, weights: HfWeights) {
        self.digest = weights.digest;
        self.weights = Some(weights);
    }

    fn release(&mut self) {
        self.weights = None;
    }

    fn prefill(&mut self, sampling: &Arc<Sampling>, past: &[u32]) -> Result<HfKv, ModelError> {
        let mut cache = KvCache::new(self.decoder.config());
        if !past.is_empty() {
            self.pass(&mut [Feed { kv: &mut cache, tokens: past }], false)?;
        }
        let seed = sampling.seed.unwrap_or_else(sample::random_seed);
        Ok(HfKv { cache, sampling: sampling.clone(), seed })
    }

    fn decode(
        &mut self,
        lanes: &mut [Lane<'_, HfKv>],
        made: &mut Vec<Made>,
    ) -> Result<(), ModelError> {
        let mut feeds: Vec<Feed<'_>> = lanes
            .iter_mut()
            .map(|lane| Feed { kv: &mut lane.kv.cache, tokens: std::slice::from_ref(&lane.last) })
            .collect();
        let logits = self.pass(&mut feeds, true)?.expect("logits were asked for");
        let config = self.decoder.config();
        for (lane, row) in lanes.iter().zip(logits.chunks_exact(config.vocab)) {
            let ends: [&[u32]; 2] = [&config.eos, &lane.kv.sampling.stop_token_ids];
            let choice = Choice {
                sampling: &lane.kv.sampling,
                seed: lane.kv.seed,
                position: lane.kv.cache.len as u64,
                forbidden: if lane.may_end { &[] } else { &ends },
                original_logprob: self.original_logprob,
            };
            made.push(sample::choose(row, &choice));
        }
        Ok(())
    }
}
