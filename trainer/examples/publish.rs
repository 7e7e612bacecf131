//! Publishes a safetensors directory as the next version of a job, and waits until every engine has it.
//!
//! ```text
//! cargo run --release -p anabranch-trainer --example publish -- http://127.0.0.1:5000 DIR
//! ```

use std::path::Path;

use anabranch_trainer::{Client, Error, JobConfig, VersionStatus};

/// Publishes `dir`; returns how the roll-out ended.
pub async fn publish(manager: &str, dir: &Path) -> Result<VersionStatus, Error> {
    let job = Client::connect(manager, None).await?.open(JobConfig::new("default")).await?;
    let number = job.version_at_open().await.number + 1;
    let published = job.publish_directory(number, dir).await?;
    println!("version {number}: {} bytes, copied in {:?}", published.bytes, published.copied_in);
    let version = published.sealed().await?;
    println!("{version} is sealed with root {}: engines may load it", version.root);
    // This process serves the bytes, so it stays until the engines have them.
    let status = published.settled().await?;
    for on in &status.engines {
        println!("{}: {} after {:?} {}", on.engine, on.stage, on.since, on.error);
    }
    job.close(false).await?;
    Ok(status)
}

#[tokio::main]
async fn main() -> Result<(), Error> {
    let mut args = std::env::args().skip(1);
    let (Some(manager), Some(dir)) = (args.next(), args.next()) else {
        eprintln!("usage: publish MANAGER DIR");
        return Ok(());
    };
    publish(&manager, Path::new(&dir)).await.map(|_| ())
}
