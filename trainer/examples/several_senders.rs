//! Publishes one version from several senders that each have a part of it, as the ranks of a sharded trainer
//! do. Here the ranks are tasks of one process, and the collective is a vector.
//!
//! ```text
//! cargo run --release -p anabranch-trainer --example several_senders -- http://127.0.0.1:5000
//! ```

use anabranch_trainer::{
    Client, DType, Error, Job, JobConfig, Part, PieceRef, Sender, TensorSpec, VersionStatus,
};

const WORLD: u32 = 2;
const ELEMENTS: u64 = 1 << 18;

/// One rank: opens the job as a sender, and publishes the one tensor that it has.
async fn rank(manager: &str, index: u32) -> Result<(Job, Part), Error> {
    let mut config = JobConfig::new("default");
    config.weights.sender = Some(Sender { index, count: WORLD });
    let job = Client::connect(manager, None).await?.open(config).await?;
    let number = job.version_at_open().await.number + 1;
    // All tensors, the same list at every rank.
    let name = |i: u32| format!("layers.{i}.weight");
    let spec = |i| TensorSpec { name: name(i), dtype: DType::F32, shape: vec![ELEMENTS] };
    let layout: Vec<TensorSpec> = (0..WORLD).map(spec).collect();
    let data = vec![index as u8; ELEMENTS as usize * 4];
    let piece = PieceRef { tensor: &name(index), offset: 0, data: &data };
    let part = job.publish_part(number, &layout, &[piece]).await?;
    println!("rank {index}: {} of {} bytes", part.bytes, part.image_bytes);
    Ok((job, part))
}

/// Publishes one version from all ranks; returns how the roll-out ended.
pub async fn publish(manager: &str) -> Result<VersionStatus, Error> {
    // The jobs serve their parts until they are closed.
    let (mut jobs, mut parts) = (Vec::new(), Vec::new());
    for index in 0..WORLD {
        let (job, part) = rank(manager, index).await?;
        jobs.push(job);
        parts.push(part);
    }
    // In a real trainer: all_gather(part.info()), ordered by rank.
    let infos: Vec<Vec<u8>> = parts.iter().map(|part| part.info().to_vec()).collect();
    let mut published = Vec::new();
    for part in parts {
        published.push(part.seal(&infos).await?);
    }
    // A step may begin when every rank has come through here.
    for one in &published {
        println!("{} is sealed", one.sealed().await?);
    }
    let status = published[0].settled().await?;
    for job in jobs {
        job.close(false).await?;
    }
    Ok(status)
}

#[tokio::main]
async fn main() -> Result<(), Error> {
    let manager = std::env::args().nth(1).unwrap_or("http://127.0.0.1:5000".into());
    publish(&manager).await.map(|_| ())
}
