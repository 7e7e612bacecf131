//! Deaths and dead links, and the end of the streams to such a host.

use super::super::flow::{Flow, FlowId};
use super::super::node::{Life, Stream};
use super::{Happening, World};

impl World<'_> {
    pub(super) fn kill(&mut self, host: usize) {
        self.stop(host, Life::Dead);
        for flow in self.streams_to(host) {
            self.drop_stream(flow, "reset");
        }
    }

    pub(super) fn cut(&mut self, host: usize) {
        self.stop(host, Life::Cut);
        for flow in self.streams_to(host) {
            if let Some(attempt) = self.attempt(flow) {
                self.give_up_later(flow, attempt);
            }
        }
    }

    fn stop(&mut self, host: usize, life: Life) {
        self.nodes[host].life = life;
        let Some(fetch) = self.nodes[host].fetch.take() else { return };
        for stream in fetch.streams.keys() {
            self.flows.end((host, *stream));
        }
    }

    /// Gives the stream up at the progress deadline, because silence is not noticed before.
    pub(super) fn give_up_later(&mut self, flow: FlowId, attempt: u64) {
        let wait = self.rules.progress.as_secs_f64();
        self.after(wait, Happening::Unreachable { flow, attempt, why: "no progress" });
    }

    fn streams_to(&self, host: usize) -> Vec<FlowId> {
        let mut found = Vec::new();
        for (receiver, node) in self.nodes.iter().enumerate() {
            let Some(fetch) = &node.fetch else { continue };
            for (stream, state) in &fetch.streams {
                if state.source().is_some_and(|source| fetch.sources[source] == host) {
                    found.push((receiver, *stream));
                }
            }
        }
        found
    }

    fn attempt(&self, (host, stream): FlowId) -> Option<u64> {
        match self.nodes[host].fetch.as_ref()?.streams.get(&stream)? {
            Stream::Idle => None,
            Stream::Greeting { attempt, .. } | Stream::Bound { attempt, .. } => Some(*attempt),
        }
    }

    pub(super) fn lost(&mut self, flow: FlowId, attempt: u64, why: &'static str) {
        if self.attempt(flow) == Some(attempt) {
            self.drop_stream(flow, why);
        }
    }

    pub(super) fn drop_stream(&mut self, flow: FlowId, why: &str) {
        let (host, stream) = flow;
        if let Some(Flow { from, chunk, left, .. }) = self.flows.end(flow) {
            let partly = self.chunk_len(chunk) as f64 - left;
            self.count(host, from, partly);
        }
        let instant = self.instant();
        let Some(fetch) = &mut self.nodes[host].fetch else { return };
        let source = fetch.streams.insert(stream, Stream::Idle).and_then(|s| s.source());
        fetch.queue.lost(stream, instant, why, false);
        // The stream that watched a dead one is gone as well.
        let at = source.map(|source| fetch.sources[source]);
        if let Some(at) = at.filter(|at| self.nodes[*at].life != Life::Up) {
            self.nodes[at].watchers.retain(|(watcher, _)| *watcher != host);
        }
        self.pump_idle(host);
    }
}
