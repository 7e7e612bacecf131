//! Prompts by digest: each prompt crosses the link once and serves all samples of its group. Pure.

use std::collections::BTreeMap;
use std::sync::Arc;

use anabranch_proto::{pb, tokens};

/// All prompts that the manager sent in this session.
#[derive(Default)]
pub struct Prompts {
    by_digest: BTreeMap<u64, Prompt>,
    bytes: usize,
}

enum Prompt {
    /// Bytes of the parts so far; parts arrive in order on one stream.
    Partial(Vec<u8>),
    /// All ids, checked against the digest.
    Whole(Arc<[u32]>),
}

/// Reason why a part is dropped.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadPrompt {
    #[error("prompt {digest:016x}: a part at {at} follows {have} ids")]
    Gap { digest: u64, at: u32, have: usize },
    #[error("prompt {digest:016x}: {bytes} bytes are not whole token ids")]
    Column { digest: u64, bytes: usize },
    #[error("prompt {digest:016x}: its content has digest {actual:016x}")]
    Digest { digest: u64, actual: u64 },
    #[error("prompt {digest:016x}: {bytes} bytes of prompts are held, the bound is {MAX_BYTES}")]
    Full { digest: u64, bytes: usize },
}

/// Limit of bytes of all prompts together; the manager forgets prompts as their groups end.
const MAX_BYTES: usize = 1 << 30;

impl Prompts {
    /// Adds one part. A part at offset 0 starts the prompt anew, so a prompt cut off with its link
    /// is simply sent again.
    pub fn add(&mut self, part: &pb::PromptPart) -> Result<(), BadPrompt> {
        let digest = part.digest;
        if !tokens::is_column(&part.ids) {
            return Err(BadPrompt::Column { digest, bytes: part.ids.len() });
        }
        if part.at == 0 {
            self.forget(digest);
        }
        let entry = self.by_digest.entry(digest).or_insert_with(|| Prompt::Partial(Vec::new()));
        let Prompt::Partial(bytes) = entry else { return Ok(()) };
        let have = bytes.len() / tokens::WIDTH;
        if part.at as usize != have {
            return Err(BadPrompt::Gap { digest, at: part.at, have });
        }
        if self.bytes + part.ids.len() > MAX_BYTES {
            return Err(BadPrompt::Full { digest, bytes: self.bytes });
        }
        bytes.extend_from_slice(&part.ids);
        self.bytes += part.ids.len();
        if part.last { self.complete(digest) } else { Ok(()) }
    }

    /// The ids of a complete prompt.
    pub fn get(&self, digest: u64) -> Option<Arc<[u32]>> {
        match self.by_digest.get(&digest)? {
            Prompt::Whole(ids) => Some(ids.clone()),
            Prompt::Partial(_) => None,
        }
    }

    /// Drops a prompt; its group ended.
    pub fn forget(&mut self, digest: u64) {
        match self.by_digest.remove(&digest) {
            Some(Prompt::Partial(bytes)) => self.bytes -= bytes.len(),
            Some(Prompt::Whole(ids)) => self.bytes -= ids.len() * tokens::WIDTH,
            None => {}
        }
    }

    /// Drops all prompts; a new session began.
    pub fn clear(&mut self) {
        *self = Prompts::default();
    }

    /// Checks the digest after the last part.
    fn complete(&mut self, digest: u64) -> Result<(), BadPrompt> {
        let Some(Prompt::Partial(bytes)) = self.by_digest.get(&digest) else { return Ok(()) };
        let actual = tokens::prompt_digest(bytes);
        if actual != digest {
            self.forget(digest);
            return Err(BadPrompt::Digest { digest, actual });
        }
        let ids: Arc<[u32]> = tokens::ids(bytes).collect();
        self.by_digest.insert(digest, Prompt::Whole(ids));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(ids: &[u32], cut: usize) -> Vec<pb::PromptPart> {
        let whole = tokens::encode_ids(ids);
        let digest = tokens::prompt_digest(&whole);
        let at = |n: usize| u32::try_from(n).expect("small");
        vec![
            pb::PromptPart { digest, at: 0, ids: whole.slice(..cut * 4), last: false },
            pb::PromptPart { digest, at: at(cut), ids: whole.slice(cut * 4..), last: true },
        ]
    }

    #[test]
    fn a_prompt_is_there_once_its_last_part_came_and_its_digest_fits() {
        let mut prompts = Prompts::default();
        let parts = parts(&[1, 2, 3, 4, 5], 3);
        let digest = parts[0].digest;
        assert_eq!(prompts.add(&parts[0]), Ok(()));
        assert_eq!(prompts.get(digest), None);
        assert_eq!(prompts.add(&parts[0]), Ok(()), "sent again after a lost link");
        assert_eq!(prompts.add(&parts[1]), Ok(()));
        assert_eq!(prompts.get(digest).as_deref(), Some(&[1, 2, 3, 4, 5][..]));
        prompts.forget(digest);
        assert_eq!((prompts.get(digest), prompts.bytes), (None, 0));
    }

    #[test]
    fn a_gap_a_torn_id_and_a_wrong_digest_are_refused() {
        let mut prompts = Prompts::default();
        let mut parts = parts(&[1, 2, 3], 1);
        let digest = parts[0].digest;
        assert_eq!(prompts.add(&parts[1]), Err(BadPrompt::Gap { digest, at: 1, have: 0 }));
        parts[0].ids = parts[0].ids.slice(..3);
        assert_eq!(prompts.add(&parts[0]), Err(BadPrompt::Column { digest, bytes: 3 }));
        let lie = pb::PromptPart { digest: 5, at: 0, ids: tokens::encode_ids(&[1]), last: true };
        assert!(matches!(prompts.add(&lie), Err(BadPrompt::Digest { digest: 5, .. })));
    }
}
