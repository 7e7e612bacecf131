//! Flows between hosts that share every link's rate fairly (max-min), as TCP streams roughly do.

use std::collections::BTreeMap;

/// A stream of a receiver: (host, stream).
pub(super) type FlowId = (usize, usize);

/// One chunk on its way.
pub(super) struct Flow {
    pub from: usize,
    pub chunk: u32,
    pub left: f64,
    rate: f64,
}

/// All chunks on their way.
#[derive(Default)]
pub(super) struct Flows {
    flows: BTreeMap<FlowId, Flow>,
    /// Time in seconds up to which the flows are computed.
    at: f64,
}

/// Rates of a host's link in bytes per second.
#[derive(Clone, Copy)]
pub(super) struct Link {
    pub ingress: f64,
    pub egress: f64,
}

impl Flows {
    /// Starts a chunk of `bytes` from the host `from`.
    pub fn start(&mut self, id: FlowId, from: usize, chunk: u32, bytes: u64) {
        self.flows.insert(id, Flow { from, chunk, left: bytes as f64, rate: 0.0 });
    }

    /// Takes a flow out.
    pub fn end(&mut self, id: FlowId) -> Option<Flow> {
        self.flows.remove(&id)
    }

    /// Time at which the first flow ends, if nothing changes until then.
    pub fn next_end(&self) -> Option<(f64, FlowId)> {
        let moving = self.flows.iter().filter(|(_, flow)| flow.rate > 0.0);
        let ends = moving.map(|(id, flow)| (self.at + flow.left / flow.rate, *id));
        ends.min_by(|a, b| a.0.total_cmp(&b.0))
    }

    /// Moves all flows on to the time `to`.
    pub fn advance(&mut self, to: f64) {
        let span = to - self.at;
        for flow in self.flows.values_mut() {
            flow.left = (flow.left - flow.rate * span).max(0.0);
        }
        self.at = to;
    }

    /// Shares the links fairly by progressive filling: the tightest link sets its flows' rate, and what is left goes to
    /// the others.
    pub fn share(&mut self, links: &[Link]) {
        let mut free: Vec<[(f64, u32); 2]> =
            links.iter().map(|link| [(link.egress, 0), (link.ingress, 0)]).collect();
        for (id, flow) in &mut self.flows {
            flow.rate = -1.0;
            free[flow.from][0].1 += 1;
            free[id.0][1].1 += 1;
        }
        while let Some((host, side)) = tightest(&free) {
            let (rate, flows) = free[host][side];
            let rate = rate / f64::from(flows);
            for (id, flow) in &mut self.flows {
                let ends = [(flow.from, 0), (id.0, 1)];
                if flow.rate >= 0.0 || !ends.contains(&(host, side)) {
                    continue;
                }
                flow.rate = rate;
                for (host, side) in ends {
                    let link = &mut free[host][side];
                    *link = ((link.0 - rate).max(0.0), link.1 - 1);
                }
            }
        }
    }
}

fn tightest(free: &[[(f64, u32); 2]]) -> Option<(usize, usize)> {
    let links = free
        .iter()
        .enumerate()
        .flat_map(|(host, sides)| [(host, 0, sides[0]), (host, 1, sides[1])]);
    let busy = links.filter(|(_, _, (_, flows))| *flows > 0);
    let share = |(rate, flows): (f64, u32)| rate / f64::from(flows);
    busy.min_by(|a, b| share(a.2).total_cmp(&share(b.2))).map(|(host, side, _)| (host, side))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slow_link_leaves_its_share_of_the_fast_one_to_others() {
        let link = |rate| Link { ingress: rate, egress: rate };
        let mut flows = Flows::default();
        flows.start((1, 0), 0, 0, 100);
        flows.start((2, 0), 0, 0, 100);
        flows.share(&[link(100.0), link(20.0), link(100.0)]);
        let rates: Vec<f64> = flows.flows.values().map(|flow| flow.rate).collect();
        assert_eq!(rates, [20.0, 80.0]);
        assert_eq!(flows.next_end(), Some((1.25, (2, 0))));
        flows.advance(1.0);
        assert_eq!(flows.end((1, 0)).map(|flow| flow.left), Some(80.0));
    }
}
