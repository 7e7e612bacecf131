//! Calls that steer a job: giving work up, switching the mode of colocated engines, attesting an engine's
//! weights, closing.

use std::time::Duration;

use anabranch_proto::millis::millis;
use anabranch_proto::{Step, Version, pb};

use crate::error::Error;
use crate::session::{CALL_WITHIN, Session};

/// User of the GPUs of colocated engines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// The trainer: engines end or move their samples, and release memory.
    Train,
    /// The engines.
    Generate,
}

/// Result of a mode switch at one engine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PerEngine {
    /// Id of the engine.
    pub engine: String,
    /// No sample runs there any more.
    pub drained: bool,
    /// The engine released its memory.
    pub memory_released: bool,
    /// Samples that continue on other engines.
    pub moved_samples: u32,
    /// Description of a failure; empty if all is well.
    pub error: String,
}

/// Submitted work to give up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Which {
    /// Groups with these keys.
    Keys(Vec<String>),
    /// All groups of a step.
    Step(Step),
    /// All groups of the job.
    All,
}

/// Amount of work that was given up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cancelled {
    /// Groups.
    pub groups: u32,
    /// Unfinished samples of them.
    pub samples: u32,
}

pub(crate) async fn cancel(
    session: &Session,
    which: Which,
    keep_partial: bool,
) -> Result<Cancelled, Error> {
    let call = session.call("cancel", CALL_WITHIN, |mut rpc, session| {
        let request = which.request(session, keep_partial);
        async move { rpc.cancel(request).await }
    });
    let done = call.await?;
    Ok(Cancelled { groups: done.groups, samples: done.samples })
}

pub(crate) async fn set_mode(
    session: &Session,
    mode: Mode,
    deadline: Duration,
) -> Result<Vec<PerEngine>, Error> {
    let mode = match mode {
        Mode::Train => pb::set_mode_request::Mode::Train,
        Mode::Generate => pb::set_mode_request::Mode::Generate,
    } as i32;
    let (deadline_ms, within) = (millis(deadline), deadline + CALL_WITHIN);
    let call = session.call("set the mode", within, |mut rpc, session| async move {
        rpc.set_mode(pb::SetModeRequest { session, mode, deadline_ms }).await
    });
    Ok(call.await?.engines.into_iter().map(PerEngine::from_wire).collect())
}

pub(crate) async fn report_engine(
    session: &Session,
    engine: &str,
    version: Version,
) -> Result<(), Error> {
    let call = session.call("report an engine", CALL_WITHIN, |mut rpc, session| {
        let version = Some(version.into());
        let report = pb::EngineReport { session, engine: engine.to_owned(), version };
        async move { rpc.report_engine(report).await }
    });
    call.await.map(|_| ())
}

pub(crate) async fn close(session: &Session, cancel_running: bool) -> Result<(), Error> {
    let call = session.call("close", CALL_WITHIN, |mut rpc, session| async move {
        rpc.close(pb::CloseRequest { session, cancel_running }).await
    });
    call.await.map(|_| ())
}

// === conversions ===

impl Which {
    fn request(&self, session: u64, keep_partial: bool) -> pb::CancelRequest {
        let mut request = pb::CancelRequest { session, keep_partial, ..Default::default() };
        match self {
            Which::Keys(keys) => request.keys = keys.clone(),
            Which::Step(step) => request.step = Some(step.0),
            Which::All => request.all = true,
        }
        request
    }
}

impl PerEngine {
    fn from_wire(engine: pb::mode_set::PerEngine) -> Self {
        Self {
            engine: engine.engine,
            drained: engine.drained,
            memory_released: engine.memory_released,
            moved_samples: engine.moved_samples,
            error: engine.error,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cancel_names_exactly_what_is_given_up() {
        let request = |which: Which| which.request(3, true);
        let keys = request(Which::Keys(vec!["a".into()]));
        assert_eq!((keys.keys, keys.step, keys.all), (vec!["a".to_owned()], None, false));
        let step = request(Which::Step(Step(0)));
        assert_eq!((step.keys.len(), step.step, step.all), (0, Some(0), false));
        let all = request(Which::All);
        assert_eq!((all.keys.len(), all.step, all.all), (0, None, true));
        assert!(all.keep_partial && all.session == 3);
    }
}
