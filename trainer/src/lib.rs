//! The trainer's side of Anabranch: open a job, submit prompt groups, take finished trajectories as a
//! stream of micro-batches, publish weights. Owns retries, credit, reassembly and the checks on what is
//! received. Contains no RL algorithm.
//!
//! ```no_run
//! # async fn run() -> Result<(), anabranch_trainer::Error> {
//! use std::time::Duration;
//! use anabranch_trainer::{Delivery, Group, JobConfig, Pack, Sampling, Shard, Trainer};
//!
//! let client = Trainer::connect("http://127.0.0.1:5000", None).await?;
//! let job = client.open(JobConfig::new("math")).await?;
//! let mut stream = job.consume(Pack { min: 8, ..Pack::default() }, Shard::ALL)?;
//! let group = Group::new("step1-a", vec![1, 2, 3], 4, Sampling::new(256));
//! job.submit(1, vec![group], true, Duration::from_secs(60)).await?;
//! loop {
//!     match stream.next().await? {
//!         Delivery::Batch(batch) => println!("{} trajectories", batch.trajectories.len()),
//!         Delivery::StepDone(_) => break,
//!         Delivery::Advice(_) => {}
//!     }
//! }
//! # Ok(())
//! # }
//! ```

// the link
mod client;
mod error;
// the job
mod config;
mod job;
// prompts in
mod group;
mod sampling;
mod submit;
// trajectories out
mod consume;
mod trajectory;
// weights
mod announce;
mod part;
mod publish;
mod versions;

pub use anabranch_proto::Version;
pub use anabranch_proto::manifest::DType;
pub use anabranch_proto::pb::Model;

pub use anabranch_transfer::layout::TensorSpec;
pub use anabranch_transfer::{LinkKind, Sender};
pub use client::{Client, Trainer};
pub use config::{Convention, JobConfig, OnExceed, OnRunning, Resume, Roll, Staleness};
pub use consume::{Advice, Batch, Consumer, Delivery, Pack, Shard, Short, StepDone, Window};
pub use error::Error;
pub use group::{Group, Outcome, SubmitResult};
pub use job::{Cancelled, Job, Mode, PerEngine, Which};
pub use part::{NamedPiece, Part};
pub use publish::{NamedTensor, Published, Shm, WeightServer};
pub use sampling::{Replay, Sampling};
pub use trajectory::{AttestedBy, Column, Finish, Span, Trajectory};
pub use versions::{OnEngine, VersionState, VersionStatus, VersionWatch};
