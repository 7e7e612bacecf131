//! The targets of tests/targets under libFuzzer; FUZZ_TARGET names one. Started by scripts/fuzz.sh.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;

#[allow(dead_code)]
#[path = "../../tests/targets/mod.rs"]
mod targets;

static TARGET: LazyLock<targets::Target> = LazyLock::new(|| {
    let name = std::env::var("FUZZ_TARGET").expect("FUZZ_TARGET names a target");
    let found = targets::TARGETS.iter().find(|(known, _)| *known == name);
    found.expect("FUZZ_TARGET is one of tests/targets").1
});

fuzz_target!(|bytes: &[u8]| {
    (*TARGET)(bytes);
});
