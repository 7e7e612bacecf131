//! The three files that a run leaves for the verifier: what was asked (JSON lines), which weights have which content
//! (JSON lines), and what came back (length-delimited `Trajectory` messages). Owns their formats; judges nothing.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use anabranch_engine::synthetic::SyntheticParams;
use anabranch_proto::{pb, tokens};
use anabranch_trainer::{Span, Trajectory};
use bytes::Bytes;
use prost::Message;
use serde::{Deserialize, Serialize};

/// Reason why a file cannot be written or read.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The file cannot be opened, written or read.
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: std::io::Error },
    /// A line has another form.
    #[error("{path}, line {line}: {why}")]
    Line { path: PathBuf, line: usize, why: String },
    /// A record has another form or is cut.
    #[error("{path}, byte {at}: {why}; the file was cut or is no trajectory file")]
    Record { path: PathBuf, at: usize, why: String },
}

/// Paths of the three files.
#[derive(Clone, Debug)]
pub struct Files {
    /// Prompts file: what was asked.
    pub prompts: PathBuf,
    /// Trajectories file: what came back.
    pub trajectories: PathBuf,
    /// Weights file: the content of each version.
    pub weights: PathBuf,
}

/// First line of the prompts file: facts that all samples share.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Job {
    /// Seed of the job; the samples' seeds follow from it.
    pub seed: u64,
    /// The oracle that all engines run.
    pub model: SyntheticParams,
    /// Every engine id that may have made a token.
    pub engines: Vec<String>,
}

/// One group as it was accepted.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Asked {
    /// Key of the group.
    pub key: String,
    /// Samples of the group.
    pub n: u32,
    /// Token ids of the prompt.
    pub prompt: Vec<u32>,
    /// Longest answer in tokens.
    pub max_tokens: u32,
    /// Tokens before which EOS is not allowed.
    pub min_tokens: u32,
    /// True if EOS does not end an answer.
    pub ignore_eos: bool,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum PromptLine {
    Job(Job),
    Group(Asked),
}

/// The content of one published version, digested by its publisher before the transfer saw it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Weights {
    /// Epoch of the version.
    pub epoch: u32,
    /// Number of the version.
    pub number: u64,
    /// Digest of names and content, as 64 hex digits.
    pub digest: String,
}

/// Writer of a prompts file. Each line is in the page cache when `append` returns, so a killed process loses none.
pub struct PromptLog(Lines);

/// Writer of a weights file, as safe as [`PromptLog`].
pub struct WeightsLog(Lines);

struct Lines {
    path: PathBuf,
    file: File,
}

/// Writer of a trajectories file. Records are buffered until `flush`.
pub struct TrajectoryLog {
    path: PathBuf,
    file: BufWriter<File>,
    buf: Vec<u8>,
}

// === impl Files ===

impl Files {
    /// Paths of the three files in `dir`.
    pub fn in_dir(dir: &Path) -> Self {
        Self {
            prompts: dir.join("prompts.jsonl"),
            trajectories: dir.join("trajectories.bin"),
            weights: dir.join("weights.jsonl"),
        }
    }
}

// === impl PromptLog ===

impl PromptLog {
    /// Makes the file and writes its first line.
    pub fn create(path: &Path, job: &Job) -> Result<Self, RecordError> {
        let mut lines = Lines::create(path)?;
        lines.append(&PromptLine::Job(job.clone()))?;
        Ok(Self(lines))
    }

    /// Adds a group.
    pub fn append(&mut self, asked: &Asked) -> Result<(), RecordError> {
        self.0.append(&PromptLine::Group(asked.clone()))
    }
}

// === impl WeightsLog ===

impl WeightsLog {
    /// Makes an empty file.
    pub fn create(path: &Path) -> Result<Self, RecordError> {
        Lines::create(path).map(Self)
    }

    /// Adds a version.
    pub fn append(&mut self, weights: &Weights) -> Result<(), RecordError> {
        self.0.append(weights)
    }
}

// === impl Lines ===

impl Lines {
    fn create(path: &Path) -> Result<Self, RecordError> {
        let file = File::create(path).map_err(|e| io(path, e))?;
        Ok(Self { path: path.to_owned(), file })
    }

    fn append(&mut self, value: &impl Serialize) -> Result<(), RecordError> {
        let mut text = serde_json::to_vec(value).expect("plain data always serializes");
        text.push(b'\n');
        self.file.write_all(&text).map_err(|e| io(&self.path, e))
    }
}

// === impl TrajectoryLog ===

impl TrajectoryLog {
    /// Makes an empty file.
    pub fn create(path: &Path) -> Result<Self, RecordError> {
        let file = File::create(path).map_err(|e| io(path, e))?;
        Ok(Self { path: path.to_owned(), file: BufWriter::new(file), buf: Vec::new() })
    }

    /// Adds a trajectory as the SDK delivered it.
    pub fn append(&mut self, trajectory: &Trajectory) -> Result<(), RecordError> {
        self.append_message(&message(trajectory))
    }

    /// Adds a trajectory as a message.
    pub fn append_message(&mut self, message: &pb::Trajectory) -> Result<(), RecordError> {
        self.buf.clear();
        message.encode_length_delimited(&mut self.buf).expect("a vector grows");
        self.file.write_all(&self.buf).map_err(|e| io(&self.path, e))
    }

    /// Writes out the buffer. Call this before a batch is acknowledged.
    pub fn flush(&mut self) -> Result<(), RecordError> {
        self.file.flush().map_err(|e| io(&self.path, e))
    }
}

// === reading ===

/// Reads a prompts file: the job, then all groups in their order. Fails if the first line is no job.
pub fn read_prompts(path: &Path) -> Result<(Job, Vec<Asked>), RecordError> {
    let bad =
        |line, why: &str| RecordError::Line { path: path.to_owned(), line, why: why.to_owned() };
    let (mut job, mut groups) = (None, Vec::new());
    for (at, line) in read_lines::<PromptLine>(path)?.into_iter().enumerate() {
        match (line, job.is_some()) {
            (PromptLine::Job(first), false) => job = Some(first),
            (PromptLine::Group(group), true) => groups.push(group),
            (PromptLine::Job(_), true) => return Err(bad(at + 1, "a second job line")),
            (PromptLine::Group(_), false) => {
                return Err(bad(at + 1, "a group before the job line"));
            }
        }
    }
    Ok((job.ok_or_else(|| bad(1, "no job line"))?, groups))
}

/// Reads a weights file, in order.
pub fn read_weights(path: &Path) -> Result<Vec<Weights>, RecordError> {
    read_lines(path)
}

/// Reads a trajectories file, in order. Fails if its end is torn.
pub fn read_trajectories(path: &Path) -> Result<Vec<pb::Trajectory>, RecordError> {
    let mut rest = Bytes::from(std::fs::read(path).map_err(|e| io(path, e))?);
    let total = rest.len();
    let mut out = Vec::new();
    while !rest.is_empty() {
        let at = total - rest.len();
        let record = pb::Trajectory::decode_length_delimited(&mut rest)
            .map_err(|e| RecordError::Record { path: path.to_owned(), at, why: e.to_string() })?;
        out.push(record);
    }
    Ok(out)
}

fn read_lines<T: serde::de::DeserializeOwned>(path: &Path) -> Result<Vec<T>, RecordError> {
    let text = std::fs::read_to_string(path).map_err(|e| io(path, e))?;
    let parse = |(at, line): (usize, &str)| {
        serde_json::from_str(line).map_err(|e| RecordError::Line {
            path: path.to_owned(),
            line: at + 1,
            why: e.to_string(),
        })
    };
    text.lines().enumerate().map(parse).collect()
}

fn io(path: &Path, source: std::io::Error) -> RecordError {
    RecordError::Io { path: path.to_owned(), source }
}

// === a trajectory as a message ===

fn message(t: &Trajectory) -> pb::Trajectory {
    pb::Trajectory {
        key: t.key.clone(),
        index: t.index,
        tokens: tokens::encode_ids(&t.tokens),
        logprobs: tokens::encode_logprobs(&t.logprobs),
        spans: t.spans.iter().map(span).collect(),
        finish: t.finish.code().into(),
        finish_detail: t.finish.detail().to_owned(),
        attempts: t.attempts,
        seed: t.seed,
        offered_at: Some(t.offered_at.into()),
        discarded_tokens: t.discarded_tokens,
        ..Default::default()
    }
}

fn span(s: &Span) -> pb::Span {
    let attested_by = s.attested_by.map_or(pb::AttestedBy::Unspecified, Into::into);
    pb::Span {
        start: s.start,
        len: s.len,
        engine: Some(pb::Engine {
            id: s.engine.clone(),
            incarnation: s.incarnation,
            ..Default::default()
        }),
        version: Some(s.version.into()),
        exact: s.exact,
        kv_recomputed: s.kv_recomputed,
        attested_by: attested_by.into(),
        numerics: s.numerics,
    }
}
