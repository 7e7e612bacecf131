#!/usr/bin/env bash
# Fuzzes a parser of the data plane: scripts/fuzz.sh wire|manifest|grant|delta|part SECONDS
# New inputs go to transfer/fuzz/found/TARGET; what is worth keeping is copied to transfer/tests/corpus/TARGET
# by --keep, minimised, and from then on replayed by `cargo test`. Stable Rust and a C++ compiler suffice.
set -euo pipefail
cd "$(dirname "$0")/.."

target=${1:?wire, manifest, grant, delta or part}
seconds=${2:?seconds}
keep=${3:-}

found=transfer/fuzz/found/$target
corpus=transfer/tests/corpus/$target
mkdir -p "$found" "$corpus"

export RUSTFLAGS="-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
-Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
-Cllvm-args=-sanitizer-coverage-trace-compares \
-Ccodegen-units=1"
host=$(rustc -vV | sed -n 's/^host: //p')
# With --target, build scripts and proc macros stay without instrumentation.
cargo build --release --quiet --manifest-path transfer/fuzz/Cargo.toml --target "$host"
fuzzer=${CARGO_TARGET_DIR:-transfer/fuzz/target}/$host/release/anabranch-transfer-fuzz

FUZZ_TARGET=$target "$fuzzer" -max_total_time="$seconds" -max_len=65536 -timeout=10 -rss_limit_mb=2048 \
    -artifact_prefix="$corpus/" -print_final_stats=1 "$found" "$corpus"
if [ "$keep" = --keep ]; then
    FUZZ_TARGET=$target "$fuzzer" -merge=1 -max_len=4096 "$corpus" "$found"
fi
