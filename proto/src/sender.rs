//! Senders: the processes that publish one weight version together.

use crate::invalid::Invalid;
use crate::limits::MAX_SENDERS;
use crate::pb;

/// One of several senders of a version. All of them seal the same root.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SenderOf {
    /// Number of this sender, from 0.
    pub index: u32,
    /// Number of senders, from 1 to [`MAX_SENDERS`].
    pub count: u32,
    /// The sender has some of the version's chunks only, not all.
    pub part: bool,
}

// === impl SenderOf ===

impl SenderOf {
    /// Refuses an index that is not below the count, and a count above [`MAX_SENDERS`].
    pub fn check(self) -> Result<(), Invalid> {
        let Self { index, count, .. } = self;
        if index < count && count <= MAX_SENDERS {
            return Ok(());
        }
        let what = format!("number {index} (from 0) of {count}; at most {MAX_SENDERS}");
        Err(Invalid::rule("begin.sender", what))
    }
}

impl TryFrom<pb::publish_part::Sender> for SenderOf {
    type Error = Invalid;

    fn try_from(wire: pb::publish_part::Sender) -> Result<Self, Invalid> {
        let pb::publish_part::Sender { index, count, part } = wire;
        let sender = Self { index, count, part };
        sender.check()?;
        Ok(sender)
    }
}

impl From<SenderOf> for pb::publish_part::Sender {
    fn from(sender: SenderOf) -> Self {
        let SenderOf { index, count, part } = sender;
        Self { index, count, part }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sender_is_one_of_as_many_as_it_says() {
        let last = SenderOf { index: 3, count: 4, part: true };
        assert_eq!(SenderOf::try_from(pb::publish_part::Sender::from(last)), Ok(last));
        for (index, count, says) in [
            (4, 4, "begin.sender: number 4 (from 0) of 4; at most 1024"),
            (0, 0, "begin.sender: number 0 (from 0) of 0; at most 1024"),
            (0, 1025, "begin.sender: number 0 (from 0) of 1025; at most 1024"),
        ] {
            let refused = SenderOf { index, count, part: false }.check();
            assert_eq!(refused.expect_err(says).to_string(), says);
        }
    }
}
