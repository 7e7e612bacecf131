//! Admission of attempts: every reason against one before the engine sees it.

use std::sync::Arc;

use anabranch_proto::pb::{self, end::Why};
use anabranch_proto::{Model, Sampling, Version, tokens};

use crate::core::{AgentState, Core, Memory};

/// Reason of a refusal, and the words for it.
type Refusal = (Why, String);

impl Core {
    /// The prompt of an attempt that may start. The error is the end to report: `busy` if another
    /// engine may take the sample, `refused` if none would.
    pub(super) fn admit(&self, start: &pb::Start) -> Result<(Arc<[u32]>, Sampling), Refusal> {
        let busy = |text: &str| Err((Why::Busy, text.to_owned()));
        let Some(engine) = &self.engine else { return busy("the engine is down") };
        match self.state {
            AgentState::Serving => {}
            AgentState::Booting => return busy("the engine is starting"),
            AgentState::Draining(_) | AgentState::Stopped => return busy("the agent is draining"),
        }
        if self.session.as_ref().is_none_or(|session| session.incarnation != self.incarnation) {
            return busy("the engine was restarted");
        }
        if !matches!(self.memory, Memory::Resident) {
            return busy("the engine's memory is released");
        }
        if self.loader.serving().is_none() && !self.config.weights_by_trainer {
            return busy("the engine has no weights yet");
        }
        if self.outbox.bytes() > self.config.buffer_bytes {
            return busy("the agent's buffer is full");
        }
        if let Some(text) = self.outside_window(start) {
            return Err((Why::Busy, text));
        }
        let Some(prompt) = self.prompts.get(start.prompt) else {
            return Err((Why::Busy, format!("prompt {:016x} is not here", start.prompt)));
        };
        match refusal(&engine.model, &prompt, start) {
            Some(text) => Err((Why::Refused, text)),
            None => sampling(start).map(|sampling| (prompt, sampling)),
        }
    }

    fn outside_window(&self, start: &pb::Start) -> Option<String> {
        if self.config.weights_by_trainer {
            return None;
        }
        let serving = self.loader.next_serving().unwrap_or_else(|| self.serving_version());
        let below = bound(&start.min_version).filter(|min| serving.number < min.number);
        if let Some(min) = below {
            return Some(format!("serves {serving}, the sample needs {min} or newer"));
        }
        let above = bound(&start.max_version).filter(|max| serving.number > max.number)?;
        Some(format!("serves {serving}, the sample needs {above} or older"))
    }

    /// The version that the trainer attested. The agent learns it from the lower bound of the start
    /// order, because the trainer loads the engine itself.
    pub(super) fn attested(&self, start: &pb::Start) -> Option<Version> {
        bound(&start.min_version).filter(|_| self.config.weights_by_trainer)
    }
}

/// Reason why no engine could run the sample.
fn refusal(model: &Model, prompt: &[u32], start: &pb::Start) -> Option<String> {
    if !tokens::is_column(&start.kept) || start.kept.len() / tokens::WIDTH != start.offset as usize
    {
        let bytes = start.kept.len();
        return Some(format!("{bytes} bytes of kept tokens do not make {} tokens", start.offset));
    }
    let all = prompt.iter().copied().chain(tokens::ids(&start.kept));
    let length = prompt.len() + start.offset as usize;
    if length == 0 {
        return Some("the prompt is empty".to_owned());
    }
    let vocab = if model.vocab == 0 { u32::MAX } else { model.vocab };
    if let Some((at, id)) = all.enumerate().find(|(_, id)| *id >= vocab) {
        return Some(format!("token {id} at position {at} is outside the vocabulary of {vocab}"));
    }
    if model.max_context > 0 && length >= model.max_context as usize {
        let context = model.max_context;
        return Some(format!("{length} tokens leave no room in the context of {context}"));
    }
    None
}

/// Sampling settings of the order; those that break a bound are refused by every engine alike.
fn sampling(start: &pb::Start) -> Result<Sampling, (Why, String)> {
    let sampling = Sampling::try_from(start.sampling.clone().unwrap_or_default());
    sampling.map_err(|invalid| (Why::Refused, invalid.inside("sampling").to_string()))
}

fn bound(version: &Option<pb::Version>) -> Option<Version> {
    version.clone().and_then(|version| Version::try_from(version).ok())
}
