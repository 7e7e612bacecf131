//! The running half of the core: admission, prefill, rounds of one token, and every move of a sequence between the
//! maps that are its states.

use std::time::Duration;

use super::{Core, End, Mark, Phase, Running, Seq, SeqId, seq_len};
use crate::model::{Lane, Made, Model};

/// Largest debt of a sequence that fell behind its pace; it does not burst to catch up with more.
const PACE_DEBT: Duration = Duration::from_millis(250);

impl<M: Model, S> Core<M, S> {
    /// The next sequence that may start, if capacity and a draining update allow one.
    pub(super) fn admissible(&self) -> Option<SeqId> {
        let (&id, seq) = self.waiting.first_key_value()?;
        let gated = self.control.gate().is_some_and(|gate| id >= gate);
        let need = seq_len(seq) + 1;
        let fits = self.counters.used_tokens + need <= self.limits.kv_tokens;
        (!gated && self.running.len() < self.limits.max_running && fits).then_some(id)
    }

    pub(super) fn admit(&mut self, now: Duration) {
        while let Some(id) = self.admissible() {
            let seq = self.waiting.remove(&id).expect("admissible ids wait");
            self.counters.used_tokens += seq_len(&seq);
            let wait = self.limits.prefill_rate.map_or(0.0, |rate| seq_len(&seq) as f64 / rate);
            let ready_at = now + Duration::from_secs_f64(wait);
            self.running.insert(id, Running { seq, phase: Phase::Prefill { ready_at } });
        }
    }

    pub(super) fn prefill(&mut self, now: Duration) {
        let mut failed = Vec::new();
        for (&id, running) in &mut self.running {
            let Phase::Prefill { ready_at } = running.phase else { continue };
            if ready_at > now {
                continue;
            }
            let seq = &running.seq;
            // The newest token goes in with the first decode round.
            let mut past = seq.request.prompt.clone();
            past.extend_from_slice(&seq.tokens);
            past.pop();
            self.counters.prefilled_total += past.len() as u64;
            match self.model.prefill(&seq.request.sampling, &past) {
                Ok(kv) => running.phase = Phase::Decode { kv, due: ready_at },
                Err(error) => failed.push((id, error.to_string())),
            }
        }
        for (id, message) in failed {
            self.end(id, End::Abort { message, queued: false });
        }
    }

    /// Makes one token for every sequence that is due; returns how many there were.
    pub(super) fn round(&mut self, now: Duration) -> usize {
        let mut lanes = Vec::new();
        let mut ids = Vec::new();
        for (&id, running) in &mut self.running {
            if let Phase::Decode { kv, due } = &mut running.phase
                && *due <= now
            {
                let seq = &running.seq;
                let last = *seq
                    .tokens
                    .last()
                    .or(seq.request.prompt.last())
                    .expect("prompts are not empty");
                let may_end = seq.tokens.len() as u32 >= seq.request.sampling.min_new_tokens;
                lanes.push(Lane { kv, last, may_end });
                ids.push(id);
            }
        }
        if lanes.is_empty() {
            return 0;
        }
        let mut made = Vec::with_capacity(lanes.len());
        if let Err(error) = self.model.decode(&mut lanes, &mut made) {
            for id in ids {
                self.end(id, End::Abort { message: error.to_string(), queued: false });
            }
            return 0;
        }
        for (&id, made) in ids.iter().zip(&made) {
            self.take(id, made, now);
        }
        ids.len()
    }

    fn take(&mut self, id: SeqId, made: &Made, now: Duration) {
        let period = self.period();
        let running = self.running.get_mut(&id).expect("lanes are running sequences");
        let seq = &mut *running.seq;
        if seq.marks.last().is_none_or(|mark| mark.label != self.label) {
            seq.marks.push(Mark { label: self.label.clone(), start: seq.tokens.len() as u32 });
        }
        let may_end = seq.tokens.len() as u32 >= seq.request.sampling.min_new_tokens;
        seq.tokens.push(made.token);
        seq.logprobs.push(made.logprob);
        if seq.request.return_extra {
            seq.extras.push(made.extra);
        }
        self.counters.generated_total += 1;
        self.counters.streamed_total += u64::from(seq.request.stream);
        self.counters.used_tokens += 1;
        if let Some(end) = end_after(seq, made.token, may_end, self.model.eos_ids()) {
            self.end(id, end);
            return;
        }
        if seq.request.stream
            && (seq.tokens.len() == 1
                || seq.tokens.len() - seq.sent >= seq.request.interval as usize)
        {
            self.ready.insert(id);
        }
        if let Phase::Decode { due, .. } = &mut running.phase {
            *due = period.map_or(now, |period| (*due + period).max(now.saturating_sub(PACE_DEBT)));
        }
    }

    pub(super) fn retract_over_capacity(&mut self) {
        while self.counters.used_tokens > self.limits.kv_tokens && self.running.len() > 1 {
            let (&id, _) = self.running.last_key_value().expect("more than one runs");
            self.retract(id);
        }
    }

    pub(super) fn retract(&mut self, id: SeqId) {
        if let Some(mut running) = self.running.remove(&id) {
            self.counters.used_tokens -= seq_len(&running.seq);
            self.counters.retracted_total += 1;
            running.seq.retractions += 1;
            self.waiting.insert(id, running.seq);
        }
    }

    pub(super) fn end(&mut self, id: SeqId, end: End) {
        if let Some(seq) = self.take_out(id) {
            self.ready.remove(&id);
            self.counters.aborted_total += u64::from(matches!(end, End::Abort { .. }));
            self.ended.insert(id, (seq, end));
        }
    }

    pub(super) fn remove(&mut self, id: SeqId) -> Option<Box<Seq<S>>> {
        let seq = self.take_out(id).or_else(|| self.ended.remove(&id).map(|(seq, _)| seq))?;
        self.by_rid.remove(&seq.request.rid);
        self.ready.remove(&id);
        Some(seq)
    }

    fn take_out(&mut self, id: SeqId) -> Option<Box<Seq<S>>> {
        if let Some(running) = self.running.remove(&id) {
            self.counters.used_tokens -= seq_len(&running.seq);
            return Some(running.seq);
        }
        self.waiting.remove(&id)
    }
}

fn end_after<S>(seq: &Seq<S>, token: u32, may_end: bool, eos: &[u32]) -> Option<End> {
    let sampling = &seq.request.sampling;
    let is_eos = !sampling.ignore_eos && eos.contains(&token);
    if may_end && (is_eos || sampling.stop_token_ids.contains(&token)) {
        return Some(End::Stop { matched: token });
    }
    (seq.tokens.len() as u32 >= sampling.max_new_tokens).then_some(End::Length)
}
