//! The encoding of notices. The tags are fixed: a new notice takes the next free one.

use anabranch_manager::action::Notice;

use super::action::{stage_tag, verdict_tag};
use super::{Kind, Record};

pub(super) fn put(record: &mut Record<'_>, notice: &Notice) {
    match notice {
        Notice::JobOpened { job, epoch, resumed } => {
            record.tag(100);
            record.text(job);
            record.num(*epoch);
            record.flag(*resumed);
        }
        Notice::TrainerLost { running } => {
            record.tag(101);
            record.num(*running);
        }
        Notice::SamplesMoved { .. }
        | Notice::SamplesPlaced { .. }
        | Notice::SampleHeld { .. }
        | Notice::SampleAbandoned { .. } => put_of_sample(record, notice),
        Notice::VersionAnnounced { .. }
        | Notice::VersionAvailable { .. }
        | Notice::VersionCurrent { .. }
        | Notice::VersionSettled { .. }
        | Notice::LoadOrdered { .. }
        | Notice::LoadStage { .. } => put_of_version(record, notice),
        Notice::StepSubmitted { .. }
        | Notice::BatchOffered { .. }
        | Notice::BatchAcked { .. }
        | Notice::StepDone { .. }
        | Notice::ModeSwitched { .. } => put_of_step(record, notice),
        of_engine => put_of_engine(record, of_engine),
    }
}

fn put_of_engine(record: &mut Record<'_>, notice: &Notice) {
    match notice {
        Notice::EngineAttached { engine, incarnation, kind, kv_tokens, colocated } => {
            record.tag(110);
            record.text(engine.as_str());
            record.num(incarnation.0);
            record.text(kind);
            record.num(*kv_tokens);
            record.flag(*colocated);
        }
        Notice::EngineRefused { engine, why } => {
            record.tag(111);
            record.text(engine.as_str());
            record.sentence(why);
        }
        Notice::EngineReattached { engine, kept, dropped } => {
            record.tag(112);
            record.text(engine.as_str());
            record.num(*kept);
            record.num(*dropped);
        }
        Notice::EngineSuspect { engine, why, running } => {
            record.tag(113);
            record.text(engine.as_str());
            record.sentence(why);
            record.num(*running);
        }
        Notice::EngineServing { engine, version, probe } => {
            record.tag(114);
            record.text(engine.as_str());
            record.version(version);
            record.option(*probe, |record, verdict| record.tag(verdict_tag(verdict)));
        }
        Notice::EngineDraining { engine, deadline_ms, why } => {
            record.tag(115);
            record.text(engine.as_str());
            record.num(*deadline_ms);
            record.sentence(why);
        }
        Notice::EngineReleased { engine } => {
            record.tag(116);
            record.text(engine.as_str());
        }
        Notice::EngineGone { engine, why } => {
            record.tag(117);
            record.text(engine.as_str());
            record.sentence(why);
        }
        Notice::EngineQuarantined { engine, for_ms, why } => {
            record.tag(118);
            record.text(engine.as_str());
            record.num(*for_ms);
            record.sentence(why);
        }
        Notice::PeerMisbehaved { engine, what } => {
            record.tag(119);
            record.text(engine.as_str());
            record.sentence(what);
        }
        _ => unreachable!("`put` sends only notices of engines here"),
    }
}

fn put_of_sample(record: &mut Record<'_>, notice: &Notice) {
    match notice {
        Notice::SamplesMoved { from, samples, kept_tokens, why } => {
            record.tag(130);
            record.text(from.as_str());
            record.num(*samples);
            record.num(*kept_tokens);
            record.sentence(why);
        }
        Notice::SamplesPlaced { engine, samples, resumed } => {
            record.tag(131);
            record.text(engine.as_str());
            record.num(*samples);
            record.num(*resumed);
        }
        Notice::SampleHeld { sample, key, deaths } => {
            record.tag(132);
            record.name(Kind::SampleText, sample.as_bytes());
            record.text(key);
            record.num(*deaths);
        }
        Notice::SampleAbandoned { sample, key, why } => {
            record.tag(133);
            record.name(Kind::SampleText, sample.as_bytes());
            record.text(key);
            record.sentence(why);
        }
        _ => unreachable!("`put` sends only notices of samples here"),
    }
}

fn put_of_version(record: &mut Record<'_>, notice: &Notice) {
    match notice {
        Notice::VersionAnnounced { version, bytes } => {
            record.tag(140);
            record.version(version);
            record.num(*bytes);
        }
        Notice::VersionAvailable { version } => {
            record.tag(141);
            record.version(version);
        }
        Notice::VersionCurrent { version, waited_for_groups } => {
            record.tag(142);
            record.version(version);
            record.num(*waited_for_groups);
        }
        Notice::VersionSettled { version, engines, ms } => {
            record.tag(143);
            record.version(version);
            record.num(*engines);
            record.num(*ms);
        }
        Notice::LoadOrdered { engine, version, sources } => {
            record.tag(144);
            record.text(engine.as_str());
            record.version(version);
            record.list(sources, |record, source| record.text(source));
        }
        Notice::LoadStage { engine, version, stage, bytes, ms, error, fetched_from } => {
            record.tag(145);
            record.text(engine.as_str());
            record.version(version);
            record.tag(stage_tag(*stage));
            record.num(*bytes);
            record.num(*ms);
            record.sentence(error);
            record.num(fetched_from.len() as u64);
            for (source, bytes) in fetched_from {
                record.text(source);
                record.num(*bytes);
            }
        }
        _ => unreachable!("`put` sends only notices of versions here"),
    }
}

fn put_of_step(record: &mut Record<'_>, notice: &Notice) {
    match notice {
        Notice::StepSubmitted { step, groups, samples } => {
            record.tag(160);
            record.num(*step);
            record.num(*groups);
            record.num(*samples);
        }
        Notice::BatchOffered { seq, step, samples, tokens, last } => {
            record.tag(161);
            record.num(seq.0);
            record.num(*step);
            record.num(*samples);
            record.num(*tokens);
            record.flag(*last);
        }
        Notice::BatchAcked { seq } => {
            record.tag(162);
            record.num(seq.0);
        }
        Notice::StepDone { step, delivered, tokens, short, dropped, discarded_tokens, max_lag } => {
            record.tag(163);
            record.num(*step);
            record.num(*delivered);
            record.num(*tokens);
            record.num(*short);
            record.num(*dropped);
            record.num(*discarded_tokens);
            record.num(*max_lag);
        }
        Notice::ModeSwitched { train, engines, moved, ms } => {
            record.tag(164);
            record.flag(*train);
            record.num(*engines);
            record.num(*moved);
            record.num(*ms);
        }
        _ => unreachable!("`put` sends only notices of steps here"),
    }
}
