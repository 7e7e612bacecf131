//! Prompt groups: what is submitted.

use std::time::Duration;

use anabranch_proto::limits::{check_group_samples, check_meta, check_prompt_tokens};
use anabranch_proto::millis::millis;
use anabranch_proto::word::{check_optional_word, check_word};
use anabranch_proto::{Sampling, Version, pb, tokens};
use bytes::Bytes;

use crate::error::Error;

/// About what a group costs on the wire beside its prompt, meta and key.
pub(crate) const GROUP_BYTES: usize = 256;

/// One prompt, and how many samples of it are wanted.
#[derive(Clone, Debug, PartialEq)]
pub struct Group {
    key: String,
    prompt: Vec<u32>,
    n: u32,
    sampling: Sampling,
    pin: Option<Version>,
    conversation: String,
    priority: i32,
    deadline: Duration,
    meta: Bytes,
}

// === impl Group ===

impl Group {
    /// `n` samples of `prompt`, drawn as `sampling` says. `key` names the group, unique in (job, epoch):
    /// submitting it again makes no more work, after a crash too.
    pub fn new(key: impl Into<String>, prompt: Vec<u32>, n: u32, sampling: Sampling) -> Self {
        Self {
            key: key.into(),
            prompt,
            n,
            sampling,
            pin: None,
            conversation: String::new(),
            priority: 0,
            deadline: Duration::ZERO,
            meta: Bytes::new(),
        }
    }

    /// Lets only this version make tokens, such as for an evaluation while training goes on. Default: the
    /// job's staleness decides.
    pub fn pin(mut self, version: Version) -> Self {
        self.pin = Some(version);
        self
    }

    /// Names the conversation that the prompt continues: its turns are placed where their prefix is
    /// cached. Default none.
    pub fn conversation(mut self, conversation: impl Into<String>) -> Self {
        self.conversation = conversation.into();
        self
    }

    /// Places groups of a higher priority first. Default 0.
    pub fn priority(mut self, priority: i32) -> Self {
        self.priority = priority;
        self
    }

    /// Gives unfinished samples up after so long. Default never.
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// Attaches bytes that come back with each trajectory. Default none.
    pub fn meta(mut self, meta: impl Into<Bytes>) -> Self {
        self.meta = meta.into();
        self
    }

    /// Key of the group.
    pub fn key(&self) -> &str {
        &self.key
    }

    /// Samples that are wanted.
    pub fn n(&self) -> u32 {
        self.n
    }

    /// Refuses what could never work, with the key and the bound. Submitting calls it.
    pub fn check(&self) -> Result<(), Error> {
        check_word("key", &self.key)?;
        let checked = check_optional_word("conversation", &self.conversation)
            .and_then(|()| check_prompt_tokens(self.prompt.len()))
            .and_then(|()| check_group_samples(self.n))
            .and_then(|()| check_meta(self.meta.len()))
            .and_then(|()| self.sampling.check().map_err(|invalid| invalid.inside("sampling")));
        Ok(checked.map_err(|invalid| invalid.inside(&format!("group {:?}", self.key)))?)
    }

    pub(crate) fn into_wire(self) -> pb::Group {
        let group = self;
        pb::Group {
            prompt: tokens::encode_ids(&group.prompt),
            key: group.key,
            n: group.n,
            sampling: Some(group.sampling.into()),
            pin: group.pin.map(Into::into),
            session: group.conversation,
            priority: group.priority,
            deadline_ms: millis(group.deadline),
            meta: group.meta,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_that_could_never_work_are_refused_by_key_with_the_bound() {
        let group = |key: &str, prompt: Vec<u32>, n| Group::new(key, prompt, n, Sampling::new(4));
        let refused = |g: Group| g.check().expect_err("refused").to_string();
        assert!(refused(group("", vec![1], 1)).contains("1 to 200"));
        assert!(refused(group("a\n", vec![1], 1)).contains("unprintable"));
        let empty = refused(group("a", vec![], 1));
        assert_eq!(empty, "group \"a\": prompt: empty; a prompt has at least one token");
        assert!(refused(group("a", vec![1], 0)).contains("n: 0 is not between 1 and 4096"));
        let meta = refused(group("a", vec![1], 1).meta(vec![0; (1 << 20) + 1]));
        assert!(meta.contains("meta: 1048577 bytes"), "{meta}");
        let sampling = refused(Group::new("a", vec![1], 1, Sampling::new(0)));
        assert!(sampling.starts_with("group \"a\": sampling: max_tokens"), "{sampling}");
        assert!(group("a", vec![1], 1).conversation("talk 7").check().is_ok());
    }

    #[test]
    fn what_is_set_goes_over_the_wire() {
        let group = Group::new("a", vec![1, 2], 3, Sampling::greedy(4))
            .pin(Version::base(1))
            .conversation("talk")
            .priority(-2)
            .deadline(Duration::from_secs(3))
            .meta(&b"m"[..]);
        assert_eq!((group.key(), group.n()), ("a", 3));
        let wire = group.into_wire();
        assert_eq!((wire.prompt.len(), wire.n, wire.session.as_str()), (8, 3, "talk"));
        assert_eq!((wire.priority, wire.deadline_ms, &wire.meta[..]), (-2, 3000, &b"m"[..]));
        assert_eq!(wire.pin.map(|pin| pin.epoch), Some(1));
        assert_eq!(wire.sampling.and_then(|s| s.temperature), Some(0.0));
    }
}
