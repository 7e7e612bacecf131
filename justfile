# Short names. What the gates run stands in .ci/run, which CI calls too.

default: fmt clippy test

# Every gate, in CI's order, from formatting to the tests.
ci:
    .ci/run

fmt:
    .ci/run fmt

words:
    .ci/run words

deny:
    .ci/run deny

advisories:
    .ci/run advisories

unused:
    .ci/run unused

clippy:
    .ci/run clippy

docs:
    .ci/run docs

rdma:
    .ci/run rdma

test:
    .ci/run test

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
