//! Notices for whoever listens: a replay of the last ones, then live. Knows no socket.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use anabranch_runtime::Clock;
use tokio::sync::broadcast;

use anabranch_views::Notice;

/// A listener that connects late still sees these.
pub const REPLAY: usize = 256;
/// A listener may be so far behind before it misses some (and is told so).
const LIVE: usize = 1024;

/// One notice as it goes out.
#[derive(Debug)]
pub struct Told {
    /// 1, 2, 3, ... in this life of the manager.
    pub id: u64,
    pub name: String,
    /// With `event`, `id` and `at_ms` (since the manager started).
    pub json: String,
}

pub struct Notices {
    clock: Clock,
    ring: Mutex<Ring>,
    live: broadcast::Sender<Arc<Told>>,
}

struct Ring {
    next_id: u64,
    last: VecDeque<Arc<Told>>,
}

/// What a new listener gets.
pub struct Heard {
    pub replay: Vec<Arc<Told>>,
    pub live: broadcast::Receiver<Arc<Told>>,
}

impl Notices {
    pub fn new(clock: Clock) -> Self {
        let ring = Ring { next_id: 1, last: VecDeque::with_capacity(REPLAY) };
        Self { clock, ring: Mutex::new(ring), live: broadcast::channel(LIVE).0 }
    }

    pub fn tell(&self, notice: &Notice) {
        let mut body = serde_json::to_value(notice).expect("a notice is plain data");
        let name = body["event"].as_str().unwrap_or_default().to_owned();
        let mut ring = self.ring.lock().expect("no code panics while it holds this lock");
        let id = ring.next_id;
        ring.next_id += 1;
        body["id"] = id.into();
        body["at_ms"] = self.clock.now().as_millis().into();
        let told = Arc::new(Told { id, name, json: body.to_string() });
        if ring.last.len() == REPLAY {
            ring.last.pop_front();
        }
        ring.last.push_back(told.clone());
        // Under the lock, so that a listener sees each once. No receiver is no error.
        let _ = self.live.send(told);
    }

    /// Everything after `since` that is still known, then what comes.
    pub fn listen(&self, since: u64) -> Heard {
        let ring = self.ring.lock().expect("no code panics while it holds this lock");
        let replay = ring.last.iter().filter(|told| told.id > since).cloned().collect();
        Heard { replay, live: self.live.subscribe() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use anabranch_proto::EngineId;

    fn released(n: u64) -> Notice {
        Notice::EngineReleased { engine: EngineId::new(&format!("e{n}")) }
    }

    #[test]
    fn a_late_listener_gets_the_last_ones_and_each_once() {
        let notices = Notices::new(Clock::start());
        (0..REPLAY as u64 + 10).for_each(|n| notices.tell(&released(n)));
        let mut heard = notices.listen(0);
        assert_eq!(heard.replay.len(), REPLAY);
        assert_eq!(heard.replay[0].id, 11);
        notices.tell(&released(7));
        let live = heard.live.try_recv().expect("one");
        assert_eq!(live.id, heard.replay[REPLAY - 1].id + 1);
        assert_eq!(notices.listen(live.id).replay.len(), 0);
        assert_eq!(live.name, "engine_released");
        assert!(live.json.contains("\"engine\":\"e7\""), "{}", live.json);
    }
}
