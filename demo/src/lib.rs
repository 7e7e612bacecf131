//! The showcase job: GRPO in candle on a small transformer, with its task, its fleet and its report.

// the learner
pub mod grpo;
pub mod gsm8k;
pub mod local;
pub mod model;
pub mod optim;
pub mod recipe;
pub mod rng;
pub mod task;
pub mod trainer;
pub mod warmup;
// the fleet
pub mod cluster;
pub mod colocated;
pub mod evaluate;
pub mod rollouts;
pub mod script;
pub mod watch;
// the run
pub mod progress;
pub mod report;
pub mod run;

pub use run::{DemoArgs, DemoError, DemoOutcome, run};
