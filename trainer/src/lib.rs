//! The trainer's side of Anabranch: open a job, submit prompt groups, take finished trajectories as a
//! stream of micro-batches, publish weights. Owns retries, credit, reassembly and the checks on what is
//! received. Contains no RL algorithm.
//!
//! ```no_run
//! # async fn run() -> Result<(), anabranch_trainer::Error> {
//! use anabranch_trainer::{Client, Delivery, Group, JobConfig, Pack, Sampling, Shard};
//!
//! let client = Client::connect("http://127.0.0.1:5000", None).await?;
//! let job = client.open(JobConfig::new("math")).await?;
//! let mut stream = job.consume(Pack { min: 8, ..Pack::default() }, Shard::ALL)?;
//! let group = Group::new("step1-a", vec![1, 2, 3], 4, Sampling::new(256));
//! job.submit(1).group(group).last().send().await?;
//! loop {
//!     match stream.next().await? {
//!         Delivery::Batch(batch) => println!("{} trajectories", batch.trajectories.len()),
//!         Delivery::StepDone(_) => break,
//!     }
//! }
//! # Ok(())
//! # }
//! ```
//!
//! `examples/grpo_loop.rs` is a whole training loop, `examples/publish.rs` publishes a checkpoint, and
//! `examples/several_senders.rs` publishes one version from several processes.
//!
//! In reading order; a module imports only from modules above it:
#![warn(missing_docs)]

// verdicts, errors, trajectories: read by all the others
mod verdict;
// fails with verdicts
mod error;
mod trajectory;
// the link
mod retry;
// one manager
mod client;
mod config;
// the job at that manager, and its streams
mod session;
mod stream;
// prompts in
mod group;
mod submit;
// trajectories out
mod consume;
// weights
mod versions;
// weights out
mod publish;
// all of it, as a trainer uses it
mod control;
mod job;

pub use anabranch_proto::manifest::DType;
pub use anabranch_proto::{
    AttestedBy, BatchSeq, Finish, Invalid, LoadStage, LogprobsMode, Model, OnExceed, OnRunning,
    Pack, Replay, Roll, Root, Sampling, Shard, Staleness, Step, Version, VersionState,
};
pub use anabranch_transfer::layout::TensorSpec;
pub use anabranch_transfer::{LinkKind, PieceRef, Sender, TensorRef};

pub use client::Client;
pub use config::{JobConfig, Resume, Shm, WeightServer};
pub use consume::{Batch, Consumer, Delivery, Short, StepDone, Window};
pub use control::{Cancelled, Mode, PerEngine, Which};
pub use error::Error;
pub use group::Group;
pub use job::Job;
pub use publish::{Part, Published};
pub use submit::{Submit, Submitted};
pub use trajectory::{Column, Span, Trajectory};
pub use verdict::{Outcome, Verdict};
pub use versions::{OnEngine, VersionStatus, VersionWatch};
