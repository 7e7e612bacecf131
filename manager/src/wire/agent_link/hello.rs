//! Reads a Hello: everything about it that needs no state. What the job asks of an engine is the core's matter.

use anabranch_proto::pb;
use anabranch_proto::protocol::negotiate;
use anabranch_proto::word::{check_name, check_optional_word, check_words};
use anabranch_proto::{Caps, EngineId, Held, Incarnation, Invalid, Model, Version};

use crate::event::EngineHello;
use crate::fleet::RELAY;
use crate::wire::gate::Life;

pub(super) fn read(hello: pb::Hello, life: Life) -> Result<EngineHello, Invalid> {
    let proto = negotiate(hello.proto_min..=hello.proto_max)
        .map_err(|error| Invalid::rule("hello.proto", error))?;
    let engine = hello.engine.ok_or_else(|| Invalid::missing("hello.engine", "name the engine"))?;
    check_name("hello.engine.id", &engine.id)?;
    if engine.members > 1 || engine.member > 0 {
        let what = "multi-node engines are not supported; attach each node's own server";
        return Err(Invalid::rule("hello.engine.members", what));
    }
    let missing = || Invalid::missing("hello.caps", "say what the engine can do");
    let caps = Caps::try_from(hello.caps.ok_or_else(missing)?);
    let caps = caps.map_err(|invalid| invalid.inside("hello"))?;
    if hello.engine_kind != RELAY {
        check_sizes(hello.kv_tokens, hello.max_running)?;
    }
    let model = Model::try_from(hello.model.unwrap_or_default())?;
    check_words("hello.addresses", &hello.addresses)?;
    check_optional_word("hello.host", &hello.host)?;
    check_words("hello.caps.columns", &caps.columns)?;
    let resume = life.read(hello.resume_session);
    Ok(EngineHello {
        id: EngineId::new(&engine.id),
        incarnation: Incarnation(engine.incarnation),
        model,
        logprobs_modes: caps.logprobs_modes,
        seed_keying: caps.seed_keying,
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
        loaded: Version::read("hello.loaded", hello.loaded.unwrap_or_default())?,
        resume,
        manager_epoch: if resume.is_some() { life.epoch } else { 0 },
        kind: hello.engine_kind,
        proto,
    })
}

fn check_sizes(kv_tokens: u64, max_running: u32) -> Result<(), Invalid> {
    if kv_tokens == 0 {
        return Err(Invalid::rule(
            "hello.kv_tokens",
            "must be at least 1: without KV cache nothing can run",
        ));
    }
    if max_running == 0 {
        return Err(Invalid::rule("hello.max_running", "must be at least 1"));
    }
    Ok(())
}

fn held(held: pb::Held) -> Result<Held, Invalid> {
    Held::try_from(held).map_err(|invalid| invalid.named("hello.held.sample"))
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
                seed_keying: pb::caps::SeedKeying::AbsolutePosition.into(),
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
