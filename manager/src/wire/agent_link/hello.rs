//! Reads a Hello: everything about it that needs no state. What the job asks of an engine is the core's matter.

use anabranch_proto::pb::{self, caps};
use anabranch_proto::protocol::negotiate;
use anabranch_proto::{Attempt, EngineId, Incarnation, Version};

use crate::event::{Convention, EngineHello, Held, ModelFacts, SeedKeying};
use crate::fleet::RELAY;
use crate::wire::gate::Life;
use crate::wire::ingress::check::{Invalid, field, name, optional_word, words};

pub(super) fn read(hello: pb::Hello, life: Life) -> Result<EngineHello, Invalid> {
    let proto = negotiate(hello.proto_min..=hello.proto_max)
        .map_err(|error| field("hello.proto", error))?;
    let engine = hello.engine.ok_or_else(|| field("hello.engine", "missing"))?;
    name("hello.engine.id", &engine.id)?;
    if engine.members > 1 || engine.member > 0 {
        let what = "multi-node engines are not supported; attach each node's own server";
        return Err(field("hello.engine.members", what));
    }
    let caps = hello.caps.ok_or_else(|| field("hello.caps", "missing"))?;
    if hello.engine_kind != RELAY {
        check_sizes(hello.kv_tokens, hello.max_running)?;
    }
    let model = model(hello.model.unwrap_or_default())?;
    words("hello.addresses", &hello.addresses)?;
    optional_word("hello.host", &hello.host)?;
    words("hello.caps.columns", &caps.columns)?;
    let resume = life.read(hello.resume_session);
    Ok(EngineHello {
        id: EngineId::new(&engine.id),
        incarnation: Incarnation(engine.incarnation),
        model,
        conventions: conventions(&caps)?,
        seed_keying: seed_keying(&caps)?,
        columns: caps.columns,
        release_memory: caps.release_memory,
        weights_by_trainer: caps.weights_by_trainer,
        kv_tokens: hello.kv_tokens,
        max_running: hello.max_running,
        gpus: hello.gpus,
        labels: hello.labels.into_iter().collect(),
        addresses: hello.addresses,
        host: Some(hello.host).filter(|host| !host.is_empty()),
        held: hello.held.into_iter().map(held).collect::<Result<_, _>>()?,
        loaded: loaded(hello.loaded)?,
        resume,
        manager_epoch: if resume.is_some() { life.epoch } else { 0 },
        kind: hello.engine_kind,
        proto,
    })
}

fn check_sizes(kv_tokens: u64, max_running: u32) -> Result<(), Invalid> {
    if kv_tokens == 0 {
        return Err(field(
            "hello.kv_tokens",
            "must be at least 1: without KV cache nothing can run",
        ));
    }
    if max_running == 0 {
        return Err(field("hello.max_running", "must be at least 1"));
    }
    Ok(())
}

pub(crate) fn model(model: pb::Model) -> Result<ModelFacts, Invalid> {
    let outside = |id: &&u32| model.vocab != 0 && **id >= model.vocab;
    if let Some(id) = model.eos_ids.iter().find(outside) {
        let what = format!("{id} is outside the vocabulary of {}", model.vocab);
        return Err(field("model.eos_ids", what));
    }
    Ok(ModelFacts {
        id: model.id,
        tokenizer_digest: model.tokenizer_digest,
        vocab: model.vocab,
        max_context: model.max_context,
        eos_ids: model.eos_ids,
    })
}

fn conventions(caps: &pb::Caps) -> Result<Vec<Convention>, Invalid> {
    let read = |convention: &i32| match pb::Convention::try_from(*convention) {
        Ok(pb::Convention::Raw) => Ok(Convention::Raw),
        Ok(pb::Convention::Tempered) => Ok(Convention::Tempered),
        Ok(pb::Convention::Processed) => Ok(Convention::Processed),
        Ok(pb::Convention::Unspecified) | Err(_) => {
            let what = format!("{convention} is not a convention this manager knows");
            Err(field("hello.caps.logprob_conventions", what))
        }
    };
    if caps.logprob_conventions.is_empty() {
        let what =
            "must name at least one: a trajectory without log-probabilities cannot be trained on";
        return Err(field("hello.caps.logprob_conventions", what));
    }
    caps.logprob_conventions.iter().map(read).collect()
}

fn seed_keying(caps: &pb::Caps) -> Result<SeedKeying, Invalid> {
    match caps::SeedKeying::try_from(caps.seed_keying) {
        Ok(caps::SeedKeying::AbsolutePosition) => Ok(SeedKeying::AbsolutePosition),
        Ok(caps::SeedKeying::Stream) => Ok(SeedKeying::Stream),
        Ok(caps::SeedKeying::None) => Ok(SeedKeying::Unkeyed),
        Ok(caps::SeedKeying::Unspecified) | Err(_) => {
            Err(field("hello.caps.seed_keying", "must be absolute_position, stream or none"))
        }
    }
}

fn held(held: pb::Held) -> Result<Held, Invalid> {
    let sample = held.sample.ok_or_else(|| field("hello.held.sample", "missing"))?;
    Ok(Held { sample: sample.into(), attempt: Attempt(held.attempt), upto: held.upto })
}

fn loaded(version: Option<pb::Version>) -> Result<Version, Invalid> {
    let version = version.unwrap_or_default();
    Version::try_from(version).map_err(|error| field("hello.loaded", error))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hello() -> pb::Hello {
        pb::Hello {
            proto_min: 1,
            proto_max: 1,
            engine: Some(pb::Engine { id: "e1".into(), incarnation: 3, member: 0, members: 1 }),
            caps: Some(pb::Caps {
                seed_keying: caps::SeedKeying::AbsolutePosition.into(),
                logprob_conventions: vec![pb::Convention::Tempered.into()],
                ..pb::Caps::default()
            }),
            kv_tokens: 1000,
            max_running: 8,
            ..pb::Hello::default()
        }
    }

    fn refused(change: impl FnOnce(&mut pb::Hello)) -> String {
        let mut hello = hello();
        change(&mut hello);
        read(hello, Life::new(&[0; 32])).expect_err("refused").to_string()
    }

    #[test]
    fn a_plain_hello_is_read() {
        let read = read(hello(), Life::new(&[0; 32])).expect("valid");
        assert_eq!((read.id.as_str(), read.incarnation, read.proto), ("e1", Incarnation(3), 1));
        assert_eq!(read.resume, None);
        assert_eq!(read.loaded, Version::base(0));
    }

    #[test]
    fn each_fault_is_named_with_its_field() {
        let engine = |change: fn(&mut pb::Engine)| {
            refused(|hello| change(hello.engine.as_mut().expect("set")))
        };
        for (error, says) in [
            (refused(|hello| hello.proto_max = 0), "protocol 1..=0"),
            (refused(|hello| (hello.proto_min, hello.proto_max) = (7, 9)), "install the same"),
            (refused(|hello| hello.engine = None), "hello.engine: missing"),
            (engine(|engine| engine.id = String::new()), "hello.engine.id"),
            (engine(|engine| engine.id = "a b".into()), "hello.engine.id"),
            (engine(|engine| engine.id = "x".repeat(201)), "200"),
            (engine(|engine| engine.members = 4), "multi-node"),
            (refused(|hello| hello.caps = None), "hello.caps: missing"),
            (refused(|hello| hello.kv_tokens = 0), "hello.kv_tokens"),
            (refused(|hello| hello.max_running = 0), "hello.max_running"),
            (
                refused(|hello| {
                    hello.loaded =
                        Some(pb::Version { root: vec![1; 5].into(), ..Default::default() })
                }),
                "root has 5 bytes",
            ),
            (refused(|hello| hello.held = vec![pb::Held::default()]), "hello.held.sample"),
        ] {
            assert!(error.contains(says), "{says}: {error}");
        }
    }
}
