//! Engine calls that take time: pausing until the streams are quiet, and the probe. The core
//! decides when each is due.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anabranch_proto::Sampling;
use tokio::time::{Instant, sleep, timeout};

use crate::core::{Call, ProbeResult};
use crate::engine::{AttemptId, Engine, EngineError, Generate};
use crate::generate;
use crate::shared::Shared;

/// Silence on all streams after which a paused engine counts as quiet.
const QUIET: Duration = Duration::from_millis(30);
/// Longest wait for quiet streams. The load then goes on anyway: tokens that come later belong to
/// the old weights, and are marked so.
const MAX_QUIET_WAIT: Duration = Duration::from_secs(1);

/// Length of the probe's answer, in tokens.
const PROBE_TOKENS: u32 = 8;
/// Length of the probe's prompt, in tokens.
const PROBE_PROMPT_TOKENS: u32 = 16;
/// Time for the probe: the first tokens of a fresh engine may wait for compilation.
const PROBE_PATIENCE: Duration = Duration::from_secs(180);

/// Makes `call` and waits for the answer.
pub async fn call<E: Engine>(shared: &Shared, engine: &E, call: Call) -> Result<(), EngineError> {
    match call {
        Call::PauseForLoad => {
            engine.pause().await?;
            if shared.streams_at_engine() > 0 {
                run_dry(shared).await;
            }
            Ok(())
        }
        Call::ContinueAfterLoad | Call::Continue => engine.continue_generation().await,
        Call::Pause => engine.pause().await,
        Call::ReleaseMemory => engine.release_memory().await,
        Call::ResumeMemory => engine.resume_memory().await,
        // A load has arguments, so it is an action of its own.
        Call::Load => Ok(()),
    }
}

/// Waits until no stream brings a chunk.
async fn run_dry(shared: &Shared) {
    let give_up = Instant::now() + MAX_QUIET_WAIT;
    let mut seen = shared.chunks.load(Ordering::Relaxed);
    while Instant::now() < give_up {
        sleep(QUIET).await;
        let now = shared.chunks.load(Ordering::Relaxed);
        if now == seen {
            return;
        }
        seen = now;
    }
}

/// Runs the probe: a few greedy tokens of a fixed prompt. Equal weights give equal
/// log-probabilities.
pub async fn probe<E: Engine>(engine: &E, vocab: u32) -> Result<ProbeResult, String> {
    let request = probe_request(vocab);
    match timeout(PROBE_PATIENCE, generate::collect(engine, &request)).await {
        Ok(Ok((ids, logprobs))) => Ok(ProbeResult { ids, logprobs }),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err(format!("no answer within {} s", PROBE_PATIENCE.as_secs())),
    }
}

fn probe_request(vocab: u32) -> Generate {
    // Spread over small ids, which every vocabulary has.
    let prompt: Vec<u32> =
        (0..PROBE_PROMPT_TOKENS).map(|i| (i * 7 + 3) % vocab.clamp(1, 97)).collect();
    let sampling = Sampling::greedy(PROBE_TOKENS).ignore_eos(true);
    Generate {
        attempt: AttemptId(0),
        rid: "ab-probe".to_owned(),
        prompt: prompt.into(),
        tail: Vec::new(),
        sampling: Arc::new(sampling),
        max_tokens: PROBE_TOKENS,
        min_tokens: 0,
        stop_ids: Arc::from([]),
        seed: None,
    }
}
