# CI runs these same recipes (.ci/run).

default: fmt clippy test

fmt:
    cargo fmt --all --check

clippy:
    cargo clippy --release --workspace --all-targets --locked -- -D warnings

test:
    cargo test --release --workspace --locked

demo:
    cargo run --release -p anabranch -- demo

# More seeds than CI: just sim 20000
sim seeds="2000":
    cargo run --release -p anabranch -- sim --seeds {{seeds}}

chaos seconds="60":
    cargo run --release -p anabranch -- bench chaos --seconds {{seconds}} --report chaos.json

stream tokens="8000":
    cargo run --release -p anabranch -- bench stream --response-tokens {{tokens}} --report stream-{{tokens}}.json

# Real SGLang on CPU: see scripts/e2e
sglang dir:
    scripts/e2e/sglang.sh {{dir}}
