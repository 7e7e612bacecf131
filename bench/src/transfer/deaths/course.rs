//! One transfer of figure F under way: asks, strikes, and waits until the receivers have everything. Judges
//! nothing.

use std::time::{Duration, Instant};

use super::super::fleet::{Feed, Fleet};
use super::super::host::Pending;
use super::super::lab::PROGRESS;
use super::super::order::*;
use super::{Fault, GIVE_UP, RECEIVERS, Victim};

const LOOK: Duration = Duration::from_millis(10);

/// A transfer to all receivers under way.
pub(super) struct Course {
    issued: Issued,
    feeds: Vec<Feed>,
    started: Instant,
    /// Each receiver's order, with the time at which it was given.
    pub(super) pending: Vec<(Duration, Pending)>,
    pub(super) after: Vec<Option<Duration>>,
    pub(super) sourceless: Duration,
    pub(super) errors: Vec<String>,
}

impl Course {
    pub(super) async fn start(
        fleet: &Fleet<'_>,
        issued: &Issued,
        feeds: Vec<Feed>,
    ) -> anyhow::Result<Course> {
        let started = Instant::now();
        let mut pending = Vec::new();
        for (at, feed) in feeds.iter().enumerate() {
            pending.push((started.elapsed(), fleet.fetch(at, &issued.version, feed).await?));
        }
        let after = vec![None; feeds.len()];
        let (sourceless, errors) = (Duration::ZERO, Vec::new());
        Ok(Course { issued: issued.clone(), feeds, started, pending, after, sourceless, errors })
    }

    pub(super) async fn strike(
        &mut self,
        fleet: &mut Fleet<'_>,
        victim: Victim,
        fault: Fault,
        bytes: u64,
    ) -> anyhow::Result<()> {
        let now = Instant::now();
        match (victim.receiver(), fault) {
            (None, Fault::Kill) => {
                fleet.trainer.host.kill().await?;
                fleet.restart_trainer(&self.issued, bytes).await?;
                self.sourceless = now.elapsed();
            }
            (None, Fault::Link) => {
                fleet.net.set_link(0, false).await?;
                tokio::time::sleep(PROGRESS).await;
                fleet.net.set_link(0, true).await?;
                self.sourceless = now.elapsed();
            }
            (Some(at), Fault::Kill) => {
                fleet.receivers[at].host.kill().await?;
                fleet.restart(at).await?;
                self.ask(fleet, at).await?;
            }
            (Some(at), Fault::Link) => fleet.net.set_link(at + 1, false).await?,
        }
        Ok(())
    }

    async fn ask(&mut self, fleet: &Fleet<'_>, at: usize) -> anyhow::Result<()> {
        let order = fleet.fetch(at, &self.issued.version, &self.feeds[at]).await?;
        self.pending[at] = (self.started.elapsed(), order);
        Ok(())
    }

    /// Waits until the receivers that `of` accepts have everything. A receiver whose fetch failed is asked again, as a
    /// manager would ask it.
    pub(super) async fn finish(
        &mut self,
        fleet: &Fleet<'_>,
        of: impl Fn(usize) -> bool,
    ) -> anyhow::Result<()> {
        loop {
            let open: Vec<usize> =
                (0..RECEIVERS).filter(|at| of(*at) && self.after[*at].is_none()).collect();
            if open.is_empty() {
                return Ok(());
            }
            anyhow::ensure!(
                self.started.elapsed() < GIVE_UP,
                "receivers {open:?} are not done after {GIVE_UP:?}: {:?}",
                self.errors
            );
            for at in open {
                let (asked, order) = &mut self.pending[at];
                match tokio::time::timeout(LOOK, order.answer_in_place::<Fetched>()).await {
                    Ok(Ok(fetched)) => {
                        let took = Duration::from_secs_f64(fetched.took_ms / 1e3);
                        self.after[at] = Some(*asked + took);
                    }
                    Ok(Err(error)) => {
                        self.errors.push(format!("{error:#}"));
                        self.ask(fleet, at).await?;
                    }
                    Err(_) => {}
                }
            }
        }
    }
}
