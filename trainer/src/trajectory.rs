//! One finished sample, typed and checked: a trajectory that contradicts itself never reaches the caller.

use anabranch_proto::{Version, pb, tokens};
use bytes::Bytes;

#[derive(Clone, Debug, PartialEq)]
pub struct Trajectory {
    /// The group's, as submitted.
    pub key: String,
    /// Which of the group's samples.
    pub index: u32,
    pub tokens: Vec<u32>,
    /// One per token, in the job's convention.
    pub logprobs: Vec<f32>,
    /// Who made which tokens with which weights; they tile `[0, tokens.len())`.
    pub spans: Vec<Span>,
    /// Per-token extras.
    pub columns: Vec<Column>,
    pub finish: Finish,
    /// Placements it took: 1 where it never moved.
    pub attempts: u32,
    /// As submitted with the group.
    pub meta: Bytes,
    pub seed: u64,
    /// Current when its group was first offered.
    pub offered_at: Version,
    /// What [`Span::numerics`] indexes.
    pub numerics: Vec<String>,
    /// Made and thrown away by restarts from the prompt.
    pub discarded_tokens: u32,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Span {
    pub start: u32,
    pub len: u32,
    pub engine: String,
    pub incarnation: u64,
    pub version: Version,
    /// False: the engine could not say where inside the version changed.
    pub exact: bool,
    /// False: KV of older weights was still in use.
    pub kv_recomputed: bool,
    pub attested_by: AttestedBy,
    pub numerics: u32,
}

/// Whose word it is that the engine ran these weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttestedBy {
    /// Every chunk verified, sealed, loaded, probed.
    Transfer,
    /// The trainer loaded them and said so.
    Trainer,
    /// The engine's own start-up weights.
    Engine,
    /// The manager did not say.
    Unknown,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Finish {
    /// EOS, a stop id (empty) or the stop string that matched.
    Stop {
        matched: String,
    },
    Length,
    Cancelled,
    Abandoned {
        why: String,
    },
}

/// Row-major, little endian; `width` elements of `dtype` a token.
#[derive(Clone, Debug, PartialEq)]
pub struct Column {
    pub name: String,
    pub dtype: String,
    pub width: u32,
    pub data: Bytes,
    /// False: some tokens' rows were lost with their engine and are zero.
    pub complete: bool,
}

// === impl Trajectory ===

impl Trajectory {
    /// How far its oldest token is behind the version of its first offer; `None` where a span's
    /// version is of another epoch.
    pub fn lag(&self) -> Option<u64> {
        self.spans
            .iter()
            .try_fold(0, |worst, span| Some(span.version.lag_behind(&self.offered_at)?.max(worst)))
    }

    /// Times it went on elsewhere.
    pub fn migrations(&self) -> u32 {
        self.attempts.saturating_sub(1)
    }
}

impl TryFrom<pb::Trajectory> for Trajectory {
    type Error = String;

    fn try_from(t: pb::Trajectory) -> Result<Self, String> {
        let name = format!("trajectory {:?}/{}", t.key, t.index);
        typed(t).map_err(|why| format!("{name}: {why}"))
    }
}

fn typed(t: pb::Trajectory) -> Result<Trajectory, String> {
    let len = columns_len(&t.tokens, &t.logprobs)?;
    let finish = Finish::new(t.finish(), t.finish_detail.clone())?;
    let spans = t.spans.into_iter().map(Span::try_from).collect::<Result<Vec<_>, _>>()?;
    check_tiling(&spans, len)?;
    if let Some(span) = spans.iter().find(|s| s.numerics as usize >= t.numerics.len().max(1)) {
        let (ix, rows) = (span.numerics, t.numerics.len());
        return Err(format!("a span names numerics {ix} of a table with {rows}"));
    }
    Ok(Trajectory {
        tokens: tokens::ids(&t.tokens).collect(),
        logprobs: tokens::logprobs(&t.logprobs).collect(),
        columns: t.columns.into_iter().map(|c| Column::new(c, len)).collect::<Result<_, _>>()?,
        offered_at: version(t.offered_at)?,
        key: t.key,
        index: t.index,
        spans,
        finish,
        attempts: t.attempts,
        meta: t.meta,
        seed: t.seed,
        numerics: t.numerics,
        discarded_tokens: t.discarded_tokens,
    })
}

fn columns_len(ids: &[u8], logprobs: &[u8]) -> Result<u32, String> {
    if !tokens::is_column(ids) || ids.len() != logprobs.len() {
        let (ids, logprobs) = (ids.len(), logprobs.len());
        return Err(format!(
            "{ids} bytes of tokens, {logprobs} of logprobs; both must be 4 a token"
        ));
    }
    u32::try_from(ids.len() / tokens::WIDTH).map_err(|_| "more than 2^32 tokens".into())
}

fn check_tiling(spans: &[Span], len: u32) -> Result<(), String> {
    let mut at = 0u32;
    for span in spans {
        if span.start != at || span.len == 0 || span.len > len - at {
            let (start, of) = (span.start, span.len);
            return Err(format!(
                "span [{start}, +{of}) does not continue at {at} within {len} tokens"
            ));
        }
        at += span.len;
    }
    if at == len { Ok(()) } else { Err(format!("spans cover {at} of {len} tokens")) }
}

pub(crate) fn version(pb: Option<pb::Version>) -> Result<Version, String> {
    Version::try_from(pb.unwrap_or_default()).map_err(|error| error.to_string())
}

// === impl Span ===

impl TryFrom<pb::Span> for Span {
    type Error = String;

    fn try_from(span: pb::Span) -> Result<Self, String> {
        let attested_by = match span.attested_by() {
            pb::AttestedBy::Transfer => AttestedBy::Transfer,
            pb::AttestedBy::Trainer => AttestedBy::Trainer,
            pb::AttestedBy::Engine => AttestedBy::Engine,
            pb::AttestedBy::Unspecified => AttestedBy::Unknown,
        };
        let engine = span.engine.ok_or("a span names no engine")?;
        Ok(Self {
            start: span.start,
            len: span.len,
            engine: engine.id,
            incarnation: engine.incarnation,
            version: version(span.version)?,
            exact: span.exact,
            kv_recomputed: span.kv_recomputed,
            attested_by,
            numerics: span.numerics,
        })
    }
}

// === impl Finish ===

impl Finish {
    /// One word, for logs and files.
    pub fn word(&self) -> &'static str {
        match self {
            Finish::Stop { .. } => "stop",
            Finish::Length => "length",
            Finish::Cancelled => "cancelled",
            Finish::Abandoned { .. } => "abandoned",
        }
    }

    fn new(finish: pb::trajectory::Finish, detail: String) -> Result<Self, String> {
        use pb::trajectory::Finish as Pb;
        Ok(match finish {
            Pb::Stop => Finish::Stop { matched: detail },
            Pb::Length => Finish::Length,
            Pb::Cancelled => Finish::Cancelled,
            Pb::Abandoned => Finish::Abandoned { why: detail },
            Pb::Unspecified => return Err("it does not say how it finished".into()),
        })
    }
}

// === impl Column ===

impl Column {
    fn new(column: pb::Column, len: u32) -> Result<Self, String> {
        let pb::Column { name, dtype, width, data, complete } = column;
        let element = match dtype.as_str() {
            "u8" => 1,
            "u16" | "f16" | "bf16" => 2,
            "u32" | "i32" | "f32" => 4,
            _ => return Err(format!("column {name:?} has the unknown dtype {dtype:?}")),
        };
        let want = u64::from(len) * u64::from(width) * element;
        if width == 0 || data.len() as u64 != want {
            let got = data.len();
            return Err(format!("column {name:?} has {got} bytes, {want} expected ({len} tokens)"));
        }
        Ok(Self { name, dtype, width, data, complete })
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn sample(key: &str, index: u32, ids: &[u32]) -> pb::Trajectory {
        let engine = pb::Engine { id: "e1".into(), incarnation: 1, member: 0, members: 1 };
        let span = pb::Span {
            len: ids.len() as u32,
            engine: Some(engine),
            exact: true,
            ..Default::default()
        };
        pb::Trajectory {
            key: key.into(),
            index,
            tokens: tokens::encode_ids(ids),
            logprobs: tokens::encode_logprobs(&vec![-0.5; ids.len()]),
            spans: if ids.is_empty() { vec![] } else { vec![span] },
            finish: pb::trajectory::Finish::Length as i32,
            attempts: 1,
            ..Default::default()
        }
    }

    fn refused(change: impl FnOnce(&mut pb::Trajectory)) -> String {
        let mut t = sample("k", 3, &[1, 2, 3, 4]);
        change(&mut t);
        Trajectory::try_from(t).expect_err("it contradicts itself")
    }

    #[test]
    fn a_sound_trajectory_comes_through_typed() {
        let t = Trajectory::try_from(sample("k", 3, &[1, 2, 3])).expect("sound");
        assert_eq!((t.key.as_str(), t.index, t.tokens.as_slice()), ("k", 3, &[1, 2, 3][..]));
        assert_eq!(t.logprobs, [-0.5; 3]);
        assert_eq!((t.lag(), t.migrations(), t.finish.word()), (Some(0), 0, "length"));
        assert!(Trajectory::try_from(sample("k", 0, &[])).is_ok());
    }

    #[test]
    fn spans_that_do_not_tile_the_tokens_are_refused() {
        assert!(refused(|t| t.spans.clear()).contains("cover 0 of 4"));
        assert!(refused(|t| t.spans[0].len = 3).contains("cover 3 of 4"));
        assert!(refused(|t| t.spans[0].len = u32::MAX).contains("within 4"));
        assert!(refused(|t| t.spans[0].start = 1).contains("continue at 0"));
        assert!(
            refused(|t| t.spans.insert(0, pb::Span { len: 0, ..t.spans[0].clone() }))
                .contains("+0)")
        );
        assert!(refused(|t| t.spans.push(t.spans[0].clone())).contains("continue at 4"));
        assert!(refused(|t| t.spans[0].engine = None).contains("no engine"));
        assert!(refused(|t| t.spans[0].numerics = 1).contains("numerics 1"));
        let root = Bytes::from_static(b"short");
        let bad = pb::Version { number: 1, root, epoch: 0 };
        assert!(refused(|t| t.spans[0].version = Some(bad)).contains("root has 5 bytes"));
    }

    #[test]
    fn columns_of_the_wrong_length_are_refused_by_name() {
        let why = refused(|t| t.logprobs = Bytes::from_static(&[0; 12]));
        assert!(why.starts_with("trajectory \"k\"/3: 16 bytes of tokens, 12"), "{why}");
        assert!(refused(|t| t.tokens = Bytes::from_static(&[0; 15])).contains("15 bytes"));
        let column = |dtype: &str, width, bytes: usize| pb::Column {
            name: "experts".into(),
            dtype: dtype.into(),
            width,
            data: vec![0; bytes].into(),
            complete: true,
        };
        assert!(refused(|t| t.columns = vec![column("u8", 2, 7)]).contains("8 expected"));
        assert!(refused(|t| t.columns = vec![column("q4", 1, 4)]).contains("\"q4\""));
        assert!(refused(|t| t.columns = vec![column("u8", 0, 0)]).contains("\"experts\""));
        assert!(refused(|t| t.finish = 0).contains("how it finished"));
        assert!(refused(|t| t.finish = 99).contains("how it finished"));
    }
}
