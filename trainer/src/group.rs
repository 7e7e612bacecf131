//! What is submitted: prompt groups, and what became of each.

use std::time::Duration;

use anabranch_proto::limits::{MAX_GROUP_SAMPLES, MAX_ID_BYTES, MAX_SUBMIT_BYTES};
use anabranch_proto::{Version, pb, tokens};
use bytes::Bytes;

use crate::config::millis;
use crate::error::Error;
use crate::sampling::Sampling;

/// One prompt and how many samples of it are wanted.
#[derive(Clone, Debug, PartialEq)]
pub struct Group {
    key: String,
    prompt: Vec<u32>,
    n: u32,
    sampling: Sampling,
    pin: Option<Version>,
    session: String,
    priority: i32,
    deadline: Duration,
    meta: Bytes,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SubmitResult {
    pub key: String,
    pub outcome: Outcome,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    Accepted,
    /// The manager has this key already: nothing more will be made.
    Duplicate,
    /// It can never be made as it is.
    Rejected {
        why: String,
    },
    /// The manager was still full when the caller's time was up. Submit it again later.
    Full {
        why: String,
    },
}

// === impl Group ===

impl Group {
    /// `key` is unique in (job, epoch): submitting it again, after a crash too, makes no more work.
    pub fn new(key: impl Into<String>, prompt: Vec<u32>, n: u32, sampling: Sampling) -> Self {
        Self {
            key: key.into(),
            prompt,
            n,
            sampling,
            pin: None,
            session: String::new(),
            priority: 0,
            deadline: Duration::ZERO,
            meta: Bytes::new(),
        }
    }

    /// Only this version may make its tokens (an evaluation while training goes on).
    pub fn pin(mut self, version: Version) -> Self {
        self.pin = Some(version);
        self
    }

    /// Turns of one conversation share it; they are placed where their prefix is cached.
    pub fn session(mut self, session: impl Into<String>) -> Self {
        self.session = session.into();
        self
    }

    /// Higher goes first. Default 0.
    pub fn priority(mut self, priority: i32) -> Self {
        self.priority = priority;
        self
    }

    /// Unfinished samples are given up after so long. Default never.
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// Comes back with each trajectory.
    pub fn meta(mut self, meta: impl Into<Bytes>) -> Self {
        self.meta = meta.into();
        self
    }

    pub fn key(&self) -> &str {
        &self.key
    }

    pub fn n(&self) -> u32 {
        self.n
    }

    /// Says what could never work before anything is sent.
    pub fn check(&self) -> Result<(), Error> {
        let Self { key, n, .. } = self;
        let bad = |what: String| Err(Error::Invalid(format!("group {key:?}: {what}")));
        if key.is_empty() || key.len() > MAX_ID_BYTES || key.chars().any(char::is_control) {
            return bad(format!("a key has 1 to {MAX_ID_BYTES} printable bytes"));
        }
        if self.prompt.is_empty() {
            return bad("the prompt is empty; it needs at least one token".into());
        }
        if *n == 0 || *n > MAX_GROUP_SAMPLES {
            return bad(format!("n is {n}; it must be from 1 to {MAX_GROUP_SAMPLES}"));
        }
        if self.size() > MAX_SUBMIT_BYTES / 2 {
            let (size, most) = (self.size() >> 20, MAX_SUBMIT_BYTES >> 21);
            return bad(format!("prompt and meta have {size} MiB; {most} MiB is the most"));
        }
        self.sampling.check().or_else(|error| bad(error.to_string()))
    }

    /// About what it takes on the wire.
    pub(crate) fn size(&self) -> usize {
        self.prompt.len() * tokens::WIDTH + self.meta.len() + self.key.len() + 256
    }
}

impl From<Group> for pb::Group {
    fn from(group: Group) -> Self {
        Self {
            prompt: tokens::encode_ids(&group.prompt),
            key: group.key,
            n: group.n,
            sampling: Some(group.sampling.into()),
            pin: group.pin.map(Into::into),
            session: group.session,
            priority: group.priority,
            deadline_ms: millis(group.deadline),
            meta: group.meta,
        }
    }
}

// === impl Outcome ===

impl Outcome {
    /// The manager has it, from this call or an earlier one.
    pub fn is_taken(&self) -> bool {
        matches!(self, Outcome::Accepted | Outcome::Duplicate)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_that_could_never_work_are_refused_by_key() {
        let group = |key: &str, prompt: Vec<u32>, n| Group::new(key, prompt, n, Sampling::new(4));
        let refused = |g: Group| g.check().expect_err("refused").to_string();
        assert!(refused(group("", vec![1], 1)).contains("1 to 200"));
        assert!(refused(group("a\n", vec![1], 1)).contains("printable"));
        let empty = refused(group("a", vec![], 1));
        assert_eq!(empty, "group \"a\": the prompt is empty; it needs at least one token");
        assert!(refused(group("a", vec![1], 0)).contains("n is 0"));
        assert!(refused(group("a", vec![1], 1).meta(vec![0; 33 << 20])).contains("33 MiB"));
        assert!(refused(Group::new("a", vec![1], 1, Sampling::new(0))).contains("max_tokens"));
        assert!(group("a", vec![1], 1).check().is_ok());
    }
}
