//! A whole on-policy GRPO loop, with a stand-in for the model: submit a step, take its micro-batches, update
//! the weights, publish them, commit.
//!
//! ```text
//! cargo run --release -p anabranch-trainer --example grpo_loop -- http://127.0.0.1:5000
//! ```

use anabranch_trainer::{
    Client, DType, Delivery, Error, Group, JobConfig, Pack, Sampling, Shard, TensorRef, Trajectory,
    Version,
};

const PROMPTS: u32 = 4;
const SAMPLES: u32 = 4;

/// Trains for `steps` steps; returns the last version.
pub async fn train(manager: &str, steps: u64) -> Result<Version, Error> {
    let job = Client::connect(manager, None).await?.open(JobConfig::new("grpo")).await?;
    let pack = Pack { min: 8, whole_groups: true, ..Pack::default() };
    let mut rollouts = job.consume(pack, Shard::ALL)?;
    let mut version = job.version_at_open().await;
    let mut weights = vec![0.5_f32; 1024];
    for step in version.number + 1..=version.number + steps {
        let group = |i| Group::new(format!("{step}-{i}"), vec![i, 7], SAMPLES, Sampling::new(32));
        job.submit(step).groups((0..PROMPTS).map(group)).last().send().await?;
        let done = loop {
            match rollouts.next().await? {
                Delivery::Batch(batch) => learn(&mut weights, &batch.trajectories),
                Delivery::StepDone(done) => break done,
            }
        };
        let data: Vec<u8> = weights.iter().flat_map(|w| w.to_le_bytes()).collect();
        let tensor = TensorRef { name: "w", dtype: DType::F32, shape: &[1024], data: &data };
        let published = job.publish(step, &[tensor]).await?;
        // The next step is on-policy from here on; engines need not have the weights yet.
        version = published.sealed().await?;
        // A real trainer saves its checkpoint first.
        rollouts.commit(done.last_seq, version).await?;
        println!("step {step}: {} samples, {} tokens, {version}", done.delivered, done.tokens);
    }
    job.close(false).await?;
    Ok(version)
}

/// Stands in for the optimizer. Groups come whole, so advantages are relative to the group's mean.
fn learn(weights: &mut [f32], batch: &[Trajectory]) {
    for group in batch.chunk_by(|a, b| a.key == b.key) {
        let reward = |t: &Trajectory| t.tokens.iter().filter(|id| **id % 2 == 0).count() as f32;
        let mean = group.iter().map(reward).sum::<f32>() / group.len() as f32;
        for t in group {
            let at = t.tokens.len() % weights.len();
            weights[at] += 0.01 * (reward(t) - mean);
        }
    }
}

#[tokio::main]
async fn main() -> Result<(), Error> {
    let manager = std::env::args().nth(1).unwrap_or("http://127.0.0.1:5000".into());
    train(&manager, 5).await.map(|_| ())
}
