//! Turns a batch's names into trajectories, cut into parts of about 1 MiB. Reads the ledger; decides nothing.

use std::sync::Arc;

use anabranch_proto::limits::PART_BYTES;
use anabranch_proto::{AttestedBy, SampleId, pb};

use crate::action::{Batch, BatchSample, ShortGroup, StepReport};
use crate::ledger::{Ledger, Maker, PageView, SpanRecord};

/// A batch names a sample that the ledger has forgotten.
#[derive(Debug, thiserror::Error)]
#[error("batch {batch} names {sample}, of which no tokens are left; this is a bug of Anabranch")]
pub(crate) struct Vanished {
    batch: u64,
    sample: SampleId,
}

/// Parts of one batch, made one at a time.
pub(crate) struct Parts<'a> {
    ledger: &'a Ledger,
    batch: &'a Batch,
    samples: &'a [usize],
    at: usize,
    part: u32,
    done: bool,
}

impl<'a> Parts<'a> {
    pub fn new(ledger: &'a Ledger, batch: &'a Batch, samples: &'a [usize]) -> Self {
        Self { ledger, batch, samples, at: 0, part: 0, done: false }
    }

    fn fill(&mut self) -> Result<pb::Part, Vanished> {
        let mut trajectories = Vec::new();
        let mut bytes = 0;
        while bytes < PART_BYTES && self.at < self.samples.len() {
            let sample = &self.batch.samples[self.samples[self.at]];
            let vanished = Vanished { batch: self.batch.seq.0, sample: sample.sample };
            let view = self.ledger.view(sample.sample).ok_or(vanished)?;
            bytes += size(&view, sample);
            trajectories.push(trajectory(sample, view));
            self.at += 1;
        }
        self.done = self.at == self.samples.len();
        let part = self.part;
        self.part += 1;
        Ok(pb::Part {
            seq: self.batch.seq.0,
            step: self.batch.step.0,
            part,
            last_part: self.done,
            last_of_step: self.batch.last_of_step,
            trajectories,
            batch_samples: self.batch.samples.len() as u32,
        })
    }
}

impl Iterator for Parts<'_> {
    type Item = Result<pb::Part, Vanished>;

    /// A shard without a sample still gets one, empty part: every rank sees the same batches.
    fn next(&mut self) -> Option<Self::Item> {
        if self.done {
            return None;
        }
        let part = self.fill();
        self.done |= part.is_err();
        Some(part)
    }
}

fn size(view: &PageView, sample: &BatchSample) -> usize {
    let columns: usize = view.columns.iter().map(|column| column.data.len()).sum();
    view.tokens.len() + view.logprobs.len() + columns + sample.meta.len() + 64 * view.spans.len()
}

fn trajectory(sample: &BatchSample, view: PageView) -> pb::Trajectory {
    let mut numerics: Vec<String> = Vec::new();
    let spans = view.spans.iter().map(|record| span(record, &mut numerics)).collect();
    let columns = view.columns.into_iter().map(|column| pb::Column {
        name: column.name,
        dtype: column.dtype,
        width: column.width,
        data: column.data.into(),
        complete: column.complete,
    });
    pb::Trajectory {
        key: sample.key.to_string(),
        index: sample.sample.index,
        tokens: view.tokens,
        logprobs: view.logprobs,
        spans,
        columns: columns.collect(),
        finish: sample.finish.code().into(),
        finish_detail: sample.finish.detail().to_owned(),
        attempts: sample.attempts,
        meta: sample.meta.clone(),
        seed: sample.seed,
        offered_at: Some(sample.offered_at.into()),
        numerics,
        sample: Some(sample.sample.into()),
        discarded_tokens: sample.discarded_tokens,
    }
}

fn span(record: &SpanRecord, numerics: &mut Vec<String>) -> pb::Span {
    let class = &record.maker.numerics;
    let known = numerics.iter().position(|name| name == class);
    let index = known.unwrap_or_else(|| {
        numerics.push(class.clone());
        numerics.len() - 1
    });
    pb::Span {
        start: record.start,
        len: record.len,
        engine: Some(engine(&record.maker)),
        version: Some(record.version.into()),
        exact: record.exact,
        kv_recomputed: record.kv_recomputed,
        attested_by: pb::AttestedBy::from(attested_by(record)).into(),
        numerics: index as u32,
    }
}

fn engine(maker: &Arc<Maker>) -> pb::Engine {
    let (id, incarnation) = (maker.engine.to_string(), maker.incarnation.0);
    pb::Engine { id, incarnation, member: 0, members: 1 }
}

fn attested_by(record: &SpanRecord) -> AttestedBy {
    match (record.version.is_base(), record.maker.by_trainer) {
        (true, _) => AttestedBy::Engine,
        (false, true) => AttestedBy::Trainer,
        (false, false) => AttestedBy::Transfer,
    }
}

pub(crate) fn step_done(report: &StepReport) -> pb::StepDone {
    let short = |groups: &[ShortGroup]| {
        let one = |group: &ShortGroup| pb::step_done::Short {
            key: group.key.to_string(),
            delivered: group.delivered,
            n: group.n,
            why: group.why.clone(),
            lengths: group.lengths.clone(),
        };
        groups.iter().map(one).collect()
    };
    pb::StepDone {
        step: report.step,
        delivered: report.delivered,
        short: short(&report.short),
        dropped: short(&report.dropped),
        seq: report.seq.0,
        tokens: report.tokens,
        discarded_tokens: report.discarded_tokens,
        max_lag: u32::try_from(report.max_lag).unwrap_or(u32::MAX),
    }
}

#[cfg(test)]
mod tests;
