//! Every bound of the wire, with its unit and reason.

/// Largest message on an agent stream: a big prompt must not delay what follows by more than a frame.
pub const FRAME_BYTES: usize = 256 << 10;

/// Room for one frame's overhead; also what tonic is told to accept.
pub const MAX_MESSAGE_BYTES: usize = 4 << 20;

/// Largest `Submit` message: a 10 MB prompt group must pass.
pub const MAX_SUBMIT_BYTES: usize = 64 << 20;

/// A micro-batch is cut into parts of about this size.
pub const PART_BYTES: usize = 1 << 20;

/// Samples of one group.
pub const MAX_GROUP_SAMPLES: u32 = 4096;

/// Ids (keys, engine ids, job names) are short, printable words.
pub const MAX_ID_BYTES: usize = 200;

const _: () = assert!(FRAME_BYTES < MAX_MESSAGE_BYTES && PART_BYTES < MAX_MESSAGE_BYTES);
