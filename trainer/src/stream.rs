//! Long-lived streams of a session, attached again after every loss. One driver for all of them: consuming,
//! publishing and watching versions say what one attachment is, and the driver does the rest.
//!
//! ```text
//!   attached ── done ──────────────► the stream's result
//!      ▲  │
//!      │  ├── the link was lost ────► back-off ─┐
//!      │  ├── session forgotten ────► open again, back-off ─┤
//!      └──────────────────────────────────────────────────┘
//!         └── refused, time is up, the job was closed ──► Error
//! ```

use std::future::Future;
use std::time::Duration;

use anabranch_proto::SessionId;

use crate::client::Rpc;
use crate::error::{Error, Failure};
use crate::retry::Tries;
use crate::session::{Opened, Session};

/// A stream of the SDK, seen by the driver.
pub(crate) trait Attach {
    /// Result of a stream that came to its end.
    type Done;

    /// Attaches once and follows the stream until it is done or lost. Begins with [`Link::begin`] and tells
    /// the link of every message that it gets ([`Link::heard`]).
    fn attach(
        &mut self,
        link: &mut Link,
    ) -> impl Future<Output = Result<Self::Done, Failure>> + Send;
}

/// The driver of one stream: the session it belongs to, and the tries since the last message.
#[derive(Debug)]
pub(crate) struct Link {
    session: Session,
    call: &'static str,
    tries: Tries,
    /// Session that the newest attachment named.
    named: SessionId,
}

// === impl Link ===

impl Link {
    /// A driver that gives up when the manager is lost for longer than `lost_after`.
    pub(crate) fn new(session: Session, call: &'static str, lost_after: Duration) -> Self {
        Self { session, call, tries: Tries::new(call, lost_after), named: SessionId(0) }
    }

    /// Starts a new attachment: the manager to call, and the session to name.
    pub(crate) async fn begin(&mut self) -> (Rpc, Opened) {
        let opened = self.session.opened().await;
        self.named = opened.id;
        (self.session.client().rpc(), opened)
    }

    /// Notes that a message came: the next loss has a deadline and a back-off of its own.
    pub(crate) fn heard(&mut self) {
        self.tries.reset();
    }

    /// Attaches `stream`, again after each loss, until it is done.
    pub(crate) async fn run<A: Attach>(&mut self, stream: &mut A) -> Result<A::Done, Error> {
        let closed = self.session.closed().clone();
        tokio::select! {
            () = closed.cancelled() => Err(Error::Closed),
            done = self.follow(stream) => done,
        }
    }

    async fn follow<A: Attach>(&mut self, stream: &mut A) -> Result<A::Done, Error> {
        loop {
            match stream.attach(self).await {
                Ok(done) => return Ok(done),
                Err(failure) => self.recover(failure).await?,
            }
        }
    }

    /// Returns when the stream may attach again.
    async fn recover(&mut self, failure: Failure) -> Result<(), Error> {
        let detail = match failure {
            Failure::Final(error) => return Err(error),
            Failure::NotFound(_) => {
                self.session.renew(self.named, self.tries.left()).await?;
                "the session was opened again".to_owned()
            }
            Failure::Transport(detail) => detail,
        };
        if self.tries.is_first() {
            tracing::warn!(call = self.call, detail, "a stream was lost; attaching again");
        }
        self.tries.pause(&detail).await?;
        self.session.client().after_loss().await;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use tokio::time::Instant;

    use super::*;

    /// One attachment of a scripted stream.
    enum Turn {
        /// Lost before any message.
        Lost,
        /// Lost after a message.
        Heard,
        Refused,
        Done(u32),
        /// Never ends.
        Hangs,
    }

    struct Script(VecDeque<Turn>);

    impl Attach for Script {
        type Done = u32;

        async fn attach(&mut self, link: &mut Link) -> Result<u32, Failure> {
            let (_, opened) = link.begin().await;
            assert_eq!(opened.id, SessionId(1));
            let lost = || Err(Failure::Transport("cut".into()));
            match self.0.pop_front().unwrap_or(Turn::Lost) {
                Turn::Lost => lost(),
                Turn::Heard => {
                    link.heard();
                    lost()
                }
                Turn::Refused => {
                    let why = "taken over".to_owned();
                    Err(Failure::Final(Error::Refused { call: "consume", why }))
                }
                Turn::Done(value) => Ok(value),
                Turn::Hangs => std::future::pending().await,
            }
        }
    }

    const LOST_AFTER: Duration = Duration::from_secs(10);

    async fn run(turns: impl IntoIterator<Item = Turn>) -> (Result<u32, Error>, usize, Duration) {
        let (mut script, started) = (Script(turns.into_iter().collect()), Instant::now());
        let mut link = Link::new(Session::offline(), "consume", LOST_AFTER);
        let ended = link.run(&mut script).await;
        (ended, script.0.len(), started.elapsed())
    }

    #[tokio::test(start_paused = true)]
    async fn a_lost_stream_is_attached_again_until_it_is_done() {
        let (ended, rest, _) = run([Turn::Lost, Turn::Heard, Turn::Lost, Turn::Done(7)]).await;
        assert_eq!((ended.expect("done"), rest), (7, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn a_manager_that_stays_away_ends_the_stream_at_the_deadline() {
        let (ended, _, took) = run([]).await;
        let error = ended.expect_err("nobody answers");
        assert!(matches!(error, Error::Unreachable { call: "consume", .. }), "{error}");
        assert!(error.retry());
        assert!(took <= LOST_AFTER, "{took:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn every_message_moves_the_deadline() {
        // Each loss alone is short; together they last longer than one deadline.
        let turns = (0..300).map(|_| Turn::Heard).chain([Turn::Done(1)]);
        let (ended, _, took) = run(turns).await;
        assert_eq!(ended.expect("done"), 1);
        assert!(took > LOST_AFTER, "{took:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_refusal_is_not_tried_again() {
        let (ended, rest, took) = run([Turn::Refused, Turn::Done(1)]).await;
        assert!(matches!(ended, Err(Error::Refused { .. })));
        assert_eq!((rest, took), (1, Duration::ZERO));
    }

    #[tokio::test(start_paused = true)]
    async fn closing_the_job_ends_the_stream_at_once() {
        let session = Session::offline();
        let mut link = Link::new(session.clone(), "consume", LOST_AFTER);
        let mut script = Script([Turn::Hangs].into());
        let (ended, ()) = tokio::join!(link.run(&mut script), async {
            tokio::time::sleep(Duration::from_secs(3600)).await;
            session.closed().cancel();
        });
        assert!(matches!(ended, Err(Error::Closed)));
    }
}
