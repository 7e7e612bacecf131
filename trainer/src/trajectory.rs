//! Finished samples, typed and checked: a trajectory that contradicts itself never reaches the caller.

use anabranch_proto::{AttestedBy, Finish, Version, pb, tokens};
use bytes::Bytes;

/// A finished sample: its tokens, their log-probabilities, and who made them.
#[derive(Clone, Debug, PartialEq)]
pub struct Trajectory {
    /// Key of the group, as submitted.
    pub key: String,
    /// Number of the sample in its group, from 0.
    pub index: u32,
    /// Generated token ids, without the prompt.
    pub tokens: Vec<u32>,
    /// Log-probability of each token, in the job's logprobs mode.
    pub logprobs: Vec<f32>,
    /// Makers of the tokens, in order; the spans tile `[0, tokens.len())`.
    pub spans: Vec<Span>,
    /// Extra values per token.
    pub columns: Vec<Column>,
    /// How the sample ended.
    pub finish: Finish,
    /// Placements that the sample took: 1 if it never moved.
    pub attempts: u32,
    /// Bytes that were submitted with the group.
    pub meta: Bytes,
    /// Seed of the sample, derived from the job's or the group's.
    pub seed: u64,
    /// Version that was current when the group was first offered: what lag is measured against.
    pub offered_at: Version,
    /// Numerics of the engines, which [`Span::numerics`] is an index of.
    pub numerics: Vec<String>,
    /// Tokens that were made and thrown away by restarts from the prompt.
    pub discarded_tokens: u32,
}

/// A run of tokens that one engine made with one version of the weights.
#[derive(Clone, Debug, PartialEq)]
pub struct Span {
    /// First token.
    pub start: u32,
    /// Number of tokens, at least 1.
    pub len: u32,
    /// Id of the engine.
    pub engine: String,
    /// Life of the engine's process.
    pub incarnation: u64,
    /// Version of the weights.
    pub version: Version,
    /// False if the engine could not say at which token inside the span its version changed.
    pub exact: bool,
    /// False if KV of older weights was still in use.
    pub kv_recomputed: bool,
    /// Source of the version's label; `None` if the manager did not say.
    pub attested_by: Option<AttestedBy>,
    /// Index into [`Trajectory::numerics`].
    pub numerics: u32,
}

/// Extra values that an engine gave for each token: a matrix of one row per token.
#[derive(Clone, Debug, PartialEq)]
pub struct Column {
    /// Name of the values.
    pub name: String,
    /// Type of an element: `u8`, `u16`, `u32`, `i32`, `f16`, `bf16` or `f32`.
    pub dtype: String,
    /// Elements of a row, at least 1.
    pub width: u32,
    /// The rows, little endian.
    pub data: Bytes,
    /// False if rows were lost with their engine; those are zero.
    pub complete: bool,
}

// === impl Trajectory ===

impl Trajectory {
    /// Versions that the oldest token is behind [`Trajectory::offered_at`]; `None` if a span's version is
    /// of another epoch.
    pub fn lag(&self) -> Option<u64> {
        self.spans
            .iter()
            .try_fold(0, |worst, span| Some(span.version.lag_behind(&self.offered_at)?.max(worst)))
    }

    /// Number of times that the sample went on at another engine.
    pub fn migrations(&self) -> u32 {
        self.attempts.saturating_sub(1)
    }
}

impl Trajectory {
    pub(crate) fn from_wire(t: pb::Trajectory) -> Result<Self, String> {
        let name = format!("trajectory {:?}/{}", t.key, t.index);
        typed(t).map_err(|why| format!("{name}: {why}"))
    }
}

fn typed(t: pb::Trajectory) -> Result<Trajectory, String> {
    let len = columns_len(&t.tokens, &t.logprobs)?;
    let finish = Finish::from_wire(t.finish, t.finish_detail).map_err(|e| e.to_string())?;
    let spans = t.spans.into_iter().map(Span::from_wire).collect::<Result<Vec<_>, _>>()?;
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

impl Span {
    fn from_wire(span: pb::Span) -> Result<Self, String> {
        let attested_by = AttestedBy::from_wire("attested_by", span.attested_by);
        let engine = span.engine.ok_or("a span names no engine")?;
        Ok(Self {
            start: span.start,
            len: span.len,
            engine: engine.id,
            incarnation: engine.incarnation,
            version: version(span.version)?,
            exact: span.exact,
            kv_recomputed: span.kv_recomputed,
            attested_by: attested_by.map_err(|invalid| invalid.to_string())?,
            numerics: span.numerics,
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
        Trajectory::from_wire(t).expect_err("it contradicts itself")
    }

    #[test]
    fn a_sound_trajectory_comes_through_typed() {
        let t = Trajectory::from_wire(sample("k", 3, &[1, 2, 3])).expect("sound");
        assert_eq!((t.key.as_str(), t.index, t.tokens.as_slice()), ("k", 3, &[1, 2, 3][..]));
        assert_eq!(t.logprobs, [-0.5; 3]);
        assert_eq!((t.lag(), t.migrations(), t.finish.name()), (Some(0), 0, "length"));
        assert!(Trajectory::from_wire(sample("k", 0, &[])).is_ok());
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
        assert!(refused(|t| t.finish = 0).contains("finish: "));
        assert!(refused(|t| t.finish = 99).contains("finish: "));
    }
}
