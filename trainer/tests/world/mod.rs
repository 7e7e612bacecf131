//! A manager and an embedded engine behind an agent, all in this process, over real sockets.

use std::net::SocketAddr;

use anabranch_agent::{AgentConfig, EngineSpec};
use anabranch_engine::synthetic::SyntheticParams;
use anabranch_engine::{EngineConfig, ModelSpec, Server};
use anabranch_manager::{Manager, ManagerConfig, RawConfig};
use tempfile::TempDir;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// Everything ends when it is dropped.
pub struct World {
    pub manager: Manager,
    pub dir: TempDir,
    stop: CancellationToken,
    _tasks: JoinSet<()>,
}

impl World {
    /// Answers end at 24 tokens on average.
    pub async fn start() -> Self {
        let raw = RawConfig { listen: Some("127.0.0.1:0".into()), ..RawConfig::default() };
        let config = ManagerConfig::try_from(raw).expect("valid");
        let manager = Manager::start(config).await.expect("started");
        let (dir, stop) = (tempfile::tempdir().expect("a directory"), CancellationToken::new());
        let mut tasks = JoinSet::new();
        let engine = engine(&stop, &mut tasks).await;
        let at = EngineSpec::parse(&format!("sglang=http://{engine}")).expect("an address");
        let agent = AgentConfig {
            id: Some("e1".into()),
            staging: dir.path().to_owned(),
            ..AgentConfig::new(format!("http://{}", manager.local_addr()), at)
        };
        let agent = anabranch_agent::run(agent, stop.clone());
        tasks.spawn(async move { agent.await.expect("the agent leaves when it is told to") });
        Self { manager, dir, stop, _tasks: tasks }
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.manager.local_addr())
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

async fn engine(stop: &CancellationToken, tasks: &mut JoinSet<()>) -> SocketAddr {
    let model = SyntheticParams { mean_len: Some(24), ..SyntheticParams::default() };
    let listen = SocketAddr::from(([127, 0, 0, 1], 0));
    let config = EngineConfig::new(ModelSpec::Synthetic(model), listen);
    let server = Server::bind(config).await.expect("a free port");
    let (at, stop) = (server.local_addr(), stop.clone());
    tasks.spawn(async move { server.run(stop).await.expect("the engine runs until the end") });
    at
}
