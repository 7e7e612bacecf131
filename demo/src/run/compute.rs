//! The trainer's place to compute: one thread beside the async ones. Over matrices this small, each more
//! thread of candle's pool costs CPU and, with engines on the same cores, time as well (measured: a
//! warm-up of 3.5 s became 16 s of CPU with two).

use rayon::{ThreadPool, ThreadPoolBuildError, ThreadPoolBuilder};
use tokio::task::block_in_place;

use crate::grpo::Rollout;
use crate::model::{Model, NamedTensor};
use crate::trainer::{StepStats, Trainer};

/// The one thread on which the trainer computes.
pub struct Compute {
    pool: ThreadPool,
}

impl Compute {
    /// Starts the thread.
    pub fn start() -> Result<Self, ThreadPoolBuildError> {
        let name = |_| "trainer".to_owned();
        Ok(Self { pool: ThreadPoolBuilder::new().num_threads(1).thread_name(name).build()? })
    }

    /// Runs `work` on the thread. Blocks the caller's task, not the other tasks of its runtime.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        block_in_place(|| self.pool.install(work))
    }
}

/// The trainer with the thread on which it computes.
pub struct Learner {
    /// The trainer.
    pub trainer: Trainer,
    /// The thread.
    pub compute: Compute,
}

impl Learner {
    /// The policy as it is now.
    pub fn model(&self) -> &Model {
        self.trainer.model()
    }

    /// Adds the gradients of whole groups to the step, `size` samples at a time.
    pub fn add(&mut self, rollouts: &[Rollout], size: usize) -> candle_core::Result<()> {
        let trainer = &mut self.trainer;
        self.compute.run(|| {
            for batch in rollouts.chunks(size) {
                trainer.add_micro_batch(batch)?;
            }
            Ok(())
        })
    }

    /// Makes one optimizer step; the result is the next version.
    pub fn step(&mut self) -> candle_core::Result<StepStats> {
        let trainer = &mut self.trainer;
        self.compute.run(|| trainer.step())
    }

    /// The current version as it is published.
    pub fn tensors(&self) -> candle_core::Result<Vec<NamedTensor>> {
        self.compute.run(|| self.trainer.tensors())
    }
}
