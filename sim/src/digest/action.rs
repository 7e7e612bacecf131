//! The encoding of actions. The tags are fixed: a new action takes the next free one.

use anabranch_manager::action::{
    Action, Answer, Batch, BatchSample, DialOrder, EngineModeSet, FailKind, Finish, Holder,
    LoadOrder, ModeKind, OnEngine, ShortGroup, StartOrder, StepReport, SubmitResult, SubmitVerdict,
    VersionStatus,
};
use anabranch_manager::event::{Held, LoadStage, OnRunning, ProbeResult, Sampling, Verdict};
use anabranch_manager::ledger::{Maker, StopRules};

use super::{Record, notice};

pub(super) fn put(record: &mut Record<'_>, action: &Action) {
    match action {
        Action::OpenPage { sample, rules } => {
            record.tag(1);
            record.sample(*sample);
            rules_of(record, rules);
        }
        Action::Start(order) => {
            record.tag(2);
            start(record, order);
        }
        Action::ClearPage { sample } => {
            record.tag(3);
            record.sample(*sample);
        }
        Action::FreezePage { sample } => {
            record.tag(4);
            record.sample(*sample);
        }
        Action::Forget { samples } => {
            record.tag(5);
            record.list(samples, |record, sample| record.sample(*sample));
        }
        Action::Emit(notice) => notice::put(record, notice),
        to_trainer @ (Action::Reply { .. }
        | Action::Deliver { .. }
        | Action::StepDone { .. }
        | Action::CloseConsumer { .. }
        | Action::DialReceiver(_)
        | Action::TellPublisher { .. }) => put_for_trainer(record, to_trainer),
        to_agent => put_for_agent(record, to_agent),
    }
}

fn put_for_agent(record: &mut Record<'_>, action: &Action) {
    match action {
        Action::Welcome { link, session, lease, keep, drop, serve_key } => {
            record.tag(10);
            record.num(link.0);
            record.session(*session);
            record.wait(*lease);
            record.list(keep, held);
            record.list(drop, held);
            record.key(serve_key);
        }
        Action::Refuse { link, why, retry_after } => {
            record.tag(11);
            record.num(link.0);
            record.sentence(why);
            record.option(*retry_after, Record::wait);
        }
        Action::EndSession { session, why } => {
            record.tag(12);
            record.session(*session);
            record.sentence(why);
        }
        Action::Stop { session, sample, attempt, why } => {
            record.tag(13);
            record.session(*session);
            record.sample(*sample);
            record.num(attempt.0);
            record.sentence(why);
        }
        Action::ForgetPrompt { session, digest } => {
            record.tag(14);
            record.session(*session);
            record.prompt(*digest);
        }
        Action::OrderLoad(order) => {
            record.tag(15);
            load(record, order);
        }
        Action::CancelLoad { session, order } => {
            record.tag(16);
            record.session(*session);
            record.order(*order);
        }
        Action::OrderMode { session, order, mode, deadline, why } => {
            record.tag(17);
            record.session(*session);
            record.order(*order);
            record.tag(mode_tag(*mode));
            record.wait(*deadline);
            record.sentence(why);
        }
        _ => unreachable!("`put` sends only actions for agents here"),
    }
}

fn put_for_trainer(record: &mut Record<'_>, action: &Action) {
    match action {
        Action::Reply { to, answer } => {
            record.tag(30);
            record.num(to.0);
            reply(record, answer);
        }
        Action::Deliver { consumer, batch, samples } => {
            record.tag(31);
            record.num(consumer.0);
            batch_of(record, batch);
            record.list(samples, |record, index| record.num(*index as u64));
        }
        Action::StepDone { consumer, report } => {
            record.tag(32);
            record.num(consumer.0);
            step_report(record, report);
        }
        Action::CloseConsumer { consumer, why } => {
            record.tag(33);
            record.num(consumer.0);
            record.sentence(why);
        }
        Action::DialReceiver(order) => {
            record.tag(34);
            dial(record, order);
        }
        Action::TellPublisher { publisher, status } => {
            record.tag(35);
            record.num(publisher.0);
            version_status(record, status);
        }
        _ => unreachable!("`put` sends only actions for the trainer here"),
    }
}

fn rules_of(record: &mut Record<'_>, rules: &StopRules) {
    let StopRules { max_tokens, min_tokens, stop_ids, vocab, pin } = rules;
    record.num(*max_tokens);
    record.num(*min_tokens);
    record.list(stop_ids, |record, id| record.num(*id));
    record.num(*vocab);
    record.option(pin.as_ref(), Record::version);
}

fn start(record: &mut Record<'_>, order: &StartOrder) {
    let StartOrder {
        session,
        maker,
        sample,
        attempt,
        prompt,
        prompt_digest,
        sampling,
        stop_ids,
        seed,
        min_version,
        max_version,
        conversation,
    } = order;
    record.session(*session);
    maker_of(record, maker);
    record.sample(*sample);
    record.num(attempt.0);
    record.bytes(prompt);
    record.prompt(*prompt_digest);
    sampling_of(record, sampling);
    record.list(stop_ids.iter(), |record, id| record.num(*id));
    record.num(*seed);
    record.version(min_version);
    record.option(max_version.as_ref(), Record::version);
    record.text(conversation);
}

fn maker_of(record: &mut Record<'_>, maker: &Maker) {
    let Maker { session, engine, incarnation, by_trainer, numerics } = maker;
    record.num(session.0);
    record.text(engine.as_str());
    record.num(incarnation.0);
    record.flag(*by_trainer);
    record.text(numerics);
}

fn sampling_of(record: &mut Record<'_>, sampling: &Sampling) {
    let Sampling {
        max_tokens,
        min_tokens,
        temperature,
        top_p,
        top_k,
        min_p,
        stop_ids,
        stop_strings,
        ignore_eos,
        presence_penalty,
        frequency_penalty,
        repetition_penalty,
        seed,
        replay: _,
        extra,
    } = sampling;
    record.num(*max_tokens);
    record.num(*min_tokens);
    record.float(*temperature);
    record.float(*top_p);
    record.num(*top_k);
    record.float(*min_p);
    record.list(stop_ids, |record, id| record.num(*id));
    record.list(stop_strings, |record, text| record.text(text));
    record.flag(*ignore_eos);
    record.float(*presence_penalty);
    record.float(*frequency_penalty);
    record.float(*repetition_penalty);
    record.option(*seed, Record::num);
    record.flag(sampling.restart_ok());
    record.num(extra.len() as u64);
    for (name, value) in extra {
        record.text(name);
        record.text(value);
    }
}

fn held(record: &mut Record<'_>, held: &Held) {
    let Held { sample, attempt, upto } = held;
    record.sample(*sample);
    record.num(attempt.0);
    record.num(*upto);
}

fn load(record: &mut Record<'_>, order: &LoadOrder) {
    let LoadOrder {
        session,
        order,
        version,
        sources,
        stripe_count,
        streams,
        directory,
        bytes,
        on_running,
        deadline,
        reference,
        receiver,
        job,
    } = order;
    record.session(*session);
    record.order(*order);
    record.version(version);
    record.list(sources, holder);
    record.num(*stripe_count);
    record.num(*streams);
    record.option(directory.as_deref(), Record::text);
    record.num(*bytes);
    record.tag(match on_running {
        OnRunning::Finish => 1,
        OnRunning::Continue => 2,
        OnRunning::Abort => 3,
    });
    record.wait(*deadline);
    record.option(reference.as_ref(), probe);
    record.text(receiver.as_str());
    record.text(job);
}

fn holder(record: &mut Record<'_>, holder: &Holder) {
    let Holder { name, origin, publisher, addresses, dials, serve_key, stripes, fallback_for } =
        holder;
    record.text(name);
    record.text(origin);
    record.option(*publisher, |record, publisher| record.num(publisher.0));
    record.list(addresses, |record, address| record.text(address));
    record.flag(*dials);
    record.key(serve_key);
    record.list(stripes, |record, stripe| record.num(*stripe));
    record.list(fallback_for, |record, stripe| record.num(*stripe));
}

fn probe(record: &mut Record<'_>, probe: &ProbeResult) {
    let ProbeResult { ids, logprobs, verdict } = probe;
    record.list(ids, |record, id| record.num(*id));
    record.list(logprobs, |record, logprob| record.float(*logprob));
    record.tag(verdict_tag(*verdict));
}

fn dial(record: &mut Record<'_>, order: &DialOrder) {
    let DialOrder {
        publisher,
        source,
        receiver,
        addresses,
        serve_key,
        job,
        version,
        nonce,
        streams,
    } = order;
    record.num(publisher.0);
    record.text(source);
    record.text(receiver.as_str());
    record.list(addresses, |record, address| record.text(address));
    record.key(serve_key);
    record.text(job);
    record.version(version);
    record.order(*nonce);
    record.num(*streams);
}

fn reply(record: &mut Record<'_>, answer: &Answer) {
    match answer {
        Answer::Opened { session, floor, current, serve_key, resumed, job, logprobs_mode } => {
            record.tag(1);
            record.session(*session);
            record.num(floor.0);
            record.version(current);
            record.key(serve_key);
            record.flag(*resumed);
            record.text(job);
            record.text(logprobs_mode.name());
        }
        Answer::Submitted(results) => {
            record.tag(2);
            record.list(results, submitted);
        }
        Answer::Cancelled { groups, samples } => {
            record.tag(3);
            record.num(*groups);
            record.num(*samples);
        }
        Answer::ModeSet(engines) => {
            record.tag(4);
            record.list(engines, mode_set);
        }
        Answer::Done => record.tag(5),
        Answer::Said(said) => {
            record.tag(6);
            record.sentence(said);
        }
        Answer::Failed { why, kind } => {
            record.tag(7);
            record.sentence(why);
            record.tag(match kind {
                FailKind::BadRequest => 1,
                FailKind::NotFound => 2,
                FailKind::Conflict => 3,
                FailKind::Unavailable => 4,
            });
        }
    }
}

fn submitted(record: &mut Record<'_>, result: &SubmitResult) {
    let SubmitResult { key, verdict } = result;
    record.text(key);
    match verdict {
        SubmitVerdict::Accepted => record.tag(1),
        SubmitVerdict::Duplicate => record.tag(2),
        SubmitVerdict::Rejected { why, retry_after } => {
            record.tag(3);
            record.sentence(why);
            record.option(*retry_after, Record::wait);
        }
    }
}

fn mode_set(record: &mut Record<'_>, set: &EngineModeSet) {
    let EngineModeSet { engine, drained, memory_released, moved, error } = set;
    record.text(engine.as_str());
    record.flag(*drained);
    record.flag(*memory_released);
    record.num(*moved);
    record.sentence(error);
}

fn batch_of(record: &mut Record<'_>, batch: &Batch) {
    let Batch { seq, step, last_of_step, samples } = batch;
    record.num(seq.0);
    record.num(step.0);
    record.flag(*last_of_step);
    record.list(samples, batch_sample);
}

fn batch_sample(record: &mut Record<'_>, sample: &BatchSample) {
    let BatchSample {
        sample,
        key,
        meta,
        seed,
        attempts,
        finish,
        offered_at,
        discarded_tokens,
        tokens,
    } = sample;
    record.sample(*sample);
    record.text(key);
    record.bytes(meta);
    record.num(*seed);
    record.num(*attempts);
    match finish {
        Finish::Stop(matched) => {
            record.tag(1);
            record.text(matched);
        }
        Finish::Length => record.tag(2),
        Finish::Cancelled => record.tag(3),
        Finish::Abandoned(why) => {
            record.tag(4);
            record.sentence(why);
        }
    }
    record.version(offered_at);
    record.num(*discarded_tokens);
    record.num(*tokens);
}

fn step_report(record: &mut Record<'_>, report: &StepReport) {
    let StepReport { step, seq, delivered, tokens, discarded_tokens, max_lag, short, dropped } =
        report;
    record.num(*step);
    record.num(seq.0);
    record.num(*delivered);
    record.num(*tokens);
    record.num(*discarded_tokens);
    record.num(*max_lag);
    record.list(short, short_group);
    record.list(dropped, short_group);
}

fn short_group(record: &mut Record<'_>, group: &ShortGroup) {
    let ShortGroup { key, delivered, n, why, lengths } = group;
    record.text(key);
    record.num(*delivered);
    record.num(*n);
    record.sentence(why);
    record.list(lengths, |record, length| record.num(*length));
}

fn version_status(record: &mut Record<'_>, status: &VersionStatus) {
    let VersionStatus { version, state, bytes, engines, settled } = status;
    record.version(version);
    record.tag(state_tag(state));
    record.num(*bytes);
    record.list(engines, on_engine);
    record.flag(*settled);
}

fn on_engine(record: &mut Record<'_>, on: &OnEngine) {
    let OnEngine { engine, stage, bytes, since_sealed, error } = on;
    record.text(engine.as_str());
    record.tag(stage_tag(*stage));
    record.num(*bytes);
    record.wait(*since_sealed);
    record.sentence(error);
}

/// Tag of a state, by the name that the publisher hears.
fn state_tag(state: &str) -> u8 {
    match state {
        "announced" => 1,
        "available" => 2,
        "current" => 3,
        "superseded" => 4,
        "retired" => 5,
        _ => 0,
    }
}

fn mode_tag(mode: ModeKind) -> u8 {
    match mode {
        ModeKind::Drain => 1,
        ModeKind::ReleaseMemory => 2,
        ModeKind::ResumeMemory => 3,
        ModeKind::Leave => 4,
    }
}

pub(super) fn stage_tag(stage: LoadStage) -> u8 {
    match stage {
        LoadStage::Ordered => 1,
        LoadStage::Fetching => 2,
        LoadStage::Staged => 3,
        LoadStage::Quiescing => 4,
        LoadStage::Loading => 5,
        LoadStage::Probing => 6,
        LoadStage::Active => 7,
        LoadStage::Failed => 8,
    }
}

pub(super) fn verdict_tag(verdict: Verdict) -> u8 {
    match verdict {
        Verdict::Agrees => 1,
        Verdict::First => 2,
        Verdict::Inconclusive => 3,
        Verdict::Disagrees => 4,
    }
}
