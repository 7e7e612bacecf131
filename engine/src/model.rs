//! The interface between scheduler and model, and the synthetic model behind it. Owns no queue and no clock.

use std::path::Path;
use std::sync::Arc;

use crate::config::EngineConfig;
use crate::synthetic::{self, Chain, SyntheticParams, WeightsKey};
use crate::weights::{WeightsError, digest_table, list_tensors};

pub(crate) use crate::synthetic::Made;

/// The sampling parameters of one request, checked.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Sampling {
    pub max_new_tokens: u32,
    pub min_new_tokens: u32,
    pub temperature: f32,
    pub top_p: f32,
    /// Number of likeliest tokens to choose from; 0 is off.
    pub top_k: u32,
    pub min_p: f32,
    pub stop_token_ids: Vec<u32>,
    pub ignore_eos: bool,
    pub seed: Option<u64>,
}

/// One running sequence as the model sees it in one round.
pub(crate) struct Lane<'a, K> {
    pub kv: &'a mut K,
    /// The newest token, not yet in `kv`.
    pub last: u32,
    /// False while fewer than `min_new_tokens` are made: no EOS and no stop token may be chosen.
    pub may_end: bool,
}

/// Loads and checks a checkpoint away from the engine's thread, while the present weights serve.
pub(crate) type Loader<W> = Arc<dyn Fn(&Path) -> Result<W, WeightsError> + Send + Sync>;

#[derive(Debug, thiserror::Error)]
#[error("the model failed: {0}")]
pub(crate) struct ModelError(pub String);

pub(crate) trait Model: Send + 'static {
    type Kv: Send;
    type Weights: Send + 'static;

    fn vocab(&self) -> u32;
    fn eos_ids(&self) -> &[u32];
    /// Rounds of one token each between two looks at the command queue.
    fn rounds_per_step(&self) -> u32;
    fn digest(&self) -> [u8; 32];
    fn loader(&self) -> Loader<Self::Weights>;
    fn swap(&mut self, weights: Self::Weights);
    /// Frees the weights; nothing runs until the next [`Model::swap`].
    fn release(&mut self);
    /// Makes the state after all of `past`, ready for the token that follows it.
    fn prefill(&mut self, sampling: &Arc<Sampling>, past: &[u32]) -> Result<Self::Kv, ModelError>;
    /// Makes one token for each lane, in order.
    fn decode(
        &mut self,
        lanes: &mut [Lane<'_, Self::Kv>],
        made: &mut Vec<Made>,
    ) -> Result<(), ModelError>;
}

pub(crate) struct Synthetic {
    params: SyntheticParams,
    digest: [u8; 32],
    key: WeightsKey,
    eos: [u32; 1],
    rounds: u32,
}

pub(crate) struct SyntheticKv {
    chain: Chain,
    ignore_eos: bool,
}

impl Synthetic {
    pub fn new(params: SyntheticParams, config: &EngineConfig) -> Self {
        let digest = synthetic::base_digest();
        // Unpaced, a quantum of one chunk keeps commands prompt; paced, it only bounds catching up.
        let rounds = if config.rate.is_some() { 64 } else { config.chunk };
        Self { params, digest, key: WeightsKey::new(&digest), eos: [params.eos_id], rounds }
    }
}

impl Model for Synthetic {
    type Kv = SyntheticKv;
    type Weights = [u8; 32];

    fn vocab(&self) -> u32 {
        self.params.vocab
    }

    fn eos_ids(&self) -> &[u32] {
        &self.eos
    }

    fn rounds_per_step(&self) -> u32 {
        self.rounds
    }

    fn digest(&self) -> [u8; 32] {
        self.digest
    }

    fn loader(&self) -> Loader<[u8; 32]> {
        Arc::new(|dir| digest_table(&list_tensors(dir)?))
    }

    fn swap(&mut self, digest: [u8; 32]) {
        self.digest = digest;
        self.key = WeightsKey::new(&digest);
    }

    fn release(&mut self) {}

    fn prefill(
        &mut self,
        sampling: &Arc<Sampling>,
        past: &[u32],
    ) -> Result<SyntheticKv, ModelError> {
        let chain = Chain::new(sampling.seed.unwrap_or(0)).extend(past);
        Ok(SyntheticKv { chain, ignore_eos: sampling.ignore_eos })
    }

    fn decode(
        &mut self,
        lanes: &mut [Lane<'_, SyntheticKv>],
        made: &mut Vec<Made>,
    ) -> Result<(), ModelError> {
        for lane in lanes {
            lane.kv.chain = lane.kv.chain.push(lane.last);
            let no_end = lane.kv.ignore_eos || !lane.may_end;
            made.push(synthetic::next(lane.kv.chain, self.key, self.params, no_end));
        }
        Ok(())
    }
}
