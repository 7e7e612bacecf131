//! Notices on a ZeroMQ PUB socket: two frames, the event's name as topic and its JSON. Only on this host:
//! ZeroMQ PUB has no authentication. It drops for slow subscribers; `id` in the JSON shows gaps.

use std::sync::Arc;

use anabranch_runtime::Drain;
use tokio::sync::broadcast::error::RecvError;
use zeromq::{PubSocket, Socket, SocketSend, ZmqMessage};

use crate::config::FeedAt;
use crate::error::ManagerError;
use crate::view::notices::{Notices, Told};

pub(crate) async fn start(
    at: &FeedAt,
    notices: Arc<Notices>,
    drain: &Drain,
) -> Result<(), ManagerError> {
    let failed = |why: String| ManagerError::Feed { endpoint: at.as_str().to_owned(), why };
    remove_stale_socket(at).map_err(|error| failed(error.to_string()))?;
    let mut socket = PubSocket::new();
    socket.bind(at.as_str()).await.map_err(|error| failed(error.to_string()))?;
    tracing::info!("events are published at {}", at.as_str());
    drain.spawn("feed", run(socket, notices, drain.clone()));
    Ok(())
}

async fn run(mut socket: PubSocket, notices: Arc<Notices>, drain: Drain) {
    let mut live = notices.listen(u64::MAX).live;
    loop {
        let told = tokio::select! {
            told = live.recv() => told,
            () = drain.cancelled() => break,
        };
        match told {
            Ok(told) => {
                if let Err(error) = socket.send(message(&told)).await {
                    tracing::debug!(%error, "event was not published");
                }
            }
            Err(RecvError::Lagged(missed)) => {
                tracing::warn!("the ZeroMQ feed missed {missed} events")
            }
            Err(RecvError::Closed) => break,
        }
    }
    for error in socket.unbind_all().await {
        tracing::debug!(%error, "the feed's socket did not close well");
    }
}

fn message(told: &Told) -> ZmqMessage {
    let mut message = ZmqMessage::from(told.name.clone());
    message.push_back(told.json.clone().into());
    message
}

/// Left by a manager that was killed; a live one holds the main port, so it is not its.
fn remove_stale_socket(at: &FeedAt) -> std::io::Result<()> {
    use std::os::unix::fs::FileTypeExt;
    let Some(path) = at.as_str().strip_prefix("ipc://") else { return Ok(()) };
    match std::fs::symlink_metadata(path) {
        Ok(found) if found.file_type().is_socket() => std::fs::remove_file(path),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use anabranch_proto::EngineId;
    use anabranch_runtime::Clock;
    use anabranch_views::Notice;
    use std::time::Duration;
    use zeromq::{SocketRecv, SubSocket};

    #[tokio::test]
    async fn a_subscriber_gets_topic_and_json_even_after_an_unclean_end() {
        let path = std::env::temp_dir().join(format!("anabranch-feed-{}.sock", std::process::id()));
        let at = FeedAt::parse(&format!("ipc://{}", path.display())).expect("valid");
        drop(std::os::unix::net::UnixListener::bind(&path).expect("a stale socket is left"));
        let (notices, drain) = (Arc::new(Notices::new(Clock::start())), Drain::new());
        start(&at, notices.clone(), &drain).await.expect("bound");
        let mut subscriber = SubSocket::new();
        subscriber.connect(at.as_str()).await.expect("connected");
        subscriber.subscribe("engine_gone").await.expect("subscribed");
        let notice = Notice::EngineGone { engine: EngineId::new("e1"), why: "killed".into() };
        // A subscription takes a moment to arrive; until then PUB drops.
        let got = loop {
            notices.tell(&notice);
            let wait = tokio::time::timeout(Duration::from_millis(50), subscriber.recv());
            if let Ok(got) = wait.await {
                break got.expect("received");
            }
        };
        assert_eq!(got.get(0).expect("topic").as_ref(), b"engine_gone");
        let json: serde_json::Value =
            serde_json::from_slice(got.get(1).expect("body")).expect("JSON");
        assert_eq!(json["engine"], "e1");
        drain.close(Duration::from_secs(5)).await.expect("ended");
    }
}
