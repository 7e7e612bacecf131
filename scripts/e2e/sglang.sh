#!/usr/bin/env bash
# Runs samples on real, unmodified SGLang servers through a manager and two agents, changes the weights in
# mid-flight, kills a server in mid-flight, and checks every token. Needs no GPU.
#
#   scripts/e2e/sglang.sh DIR [OUT]
#
# DIR is what scripts/e2e/install-engines.sh made: DIR/sglang, DIR/model-a, DIR/model-b. Reports and logs go
# to OUT (default: a new directory under the temporary one). Needs 9 GB of memory and about 5 minutes.
#
# ANABRANCH  the binary (default: target/release/anabranch)
# STREAMS    which of "cumulative incremental" to run (default: both)
set -euo pipefail

usage() { sed -n '2,12s/^# \{0,1\}//p' "$0"; exit 2; }
[[ $# -ge 1 && $1 != -* ]] || usage
here=$(cd "$(dirname "$0")" && pwd)
dir=$(cd "$1" && pwd)
out=${2:-$(mktemp -d "${TMPDIR:-/tmp}/anabranch-sglang.XXXXXX")}
mkdir -p "$out"
bin=${ANABRANCH:-$here/../../target/release/anabranch}
python=$dir/sglang/bin/python
model_a=$dir/model-a model_b=$dir/model-b
samples=4 prompts=64 max_tokens=96

say() { printf '%s %s\n' "$(date +%T)" "$*" >&2; }
die() { say "$*; the logs are in $out"; exit 1; }
[[ -x $bin ]] || die "no $bin: run cargo build --release first, or set ANABRANCH"
[[ -x $python ]] || die "no $python: run scripts/e2e/install-engines.sh $dir first"

# --- processes --------------------------------------------------------------------------------------

declare -A pids=()

# start NAME COMMAND..: in a process group of its own, so that a kill takes an engine's workers too.
start() {
  local name=$1; shift
  setsid "$@" >>"$run/$name.log" 2>&1 &
  pids[$name]=$!
}

kill_hard() { kill -KILL -- "-${pids[$1]}" 2>/dev/null || true; wait "${pids[$1]}" 2>/dev/null || true; unset "pids[$1]"; }

stop_all() {
  local name
  for name in "${!pids[@]}"; do kill -TERM -- "-${pids[$name]}" 2>/dev/null || true; done
  for _ in $(seq 50); do [[ -z $(jobs -rp) ]] && break; sleep 0.2; done
  for name in "${!pids[@]}"; do kill_hard "$name"; done
}
staging=$(mktemp -d /dev/shm/anabranch-e2e.XXXXXX)
trap 'stop_all; rm -rf "$staging"' EXIT

# until_true SECONDS WHAT COMMAND..
until_true() {
  local deadline=$((SECONDS + $1)) what=$2; shift 2
  until "$@"; do
    ((SECONDS < deadline)) || die "waited in vain for: $what"
    sleep 0.1
  done
}

free_port() { "$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

# serve NAME PORT [flags]: SGLang as released, on the CPU.
serve() {
  local name=$1 port=$2; shift 2
  start "$name" env SGLANG_USE_CPU_ENGINE=1 HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PATH="$dir/sglang/bin:$PATH" \
    "$python" -m sglang.launch_server --model-path "$model_a" --served-model-name tiny --host 127.0.0.1 --port "$port" \
    --device cpu --dtype float32 --attention-backend torch_native --sampling-backend pytorch --grammar-backend none \
    --max-total-tokens 20000 --max-running-requests 16 --context-length 1024 --disable-overlap-schedule \
    --skip-server-warmup --sleep-on-idle "$@"
}

# attach NAME PORT: it lends its weights, so that an engine is served after the publisher has gone.
attach() {
  start "$1" "$bin" agent --manager "$(manager)" --id "$1" --listen 127.0.0.1:0 --staging "$staging/$stream" \
    --engine "sglang=http://127.0.0.1:$2"
}

answers() { curl -sf -o /dev/null "http://127.0.0.1:$1/model_info"; }

# --- what the manager says --------------------------------------------------------------------------

manager() { printf 'file:%s/manager.json' "$run"; }
# ask_state EXPRESSION: of the manager's /state, as Python sees it.
ask_state() {
  curl -sf "$(url)/state" | "$python" -c 'import json, sys; s = json.load(sys.stdin); print(eval(sys.argv[1]))' "$1"
}
url() { "$python" -c 'import json, sys; print(json.load(open(sys.argv[1]))["url"])' "$run/manager.json"; }
at_least() { (($(ask_state "$1") >= $2)); }
serving() { at_least "sum(e['state'] == 'serving' and e['version']['number'] == $1 for e in s['engines'])" "$2"; }

# --- one phase --------------------------------------------------------------------------------------

# phase NAME TEMPERATURE MODEL VERSION VICTIM: publishes MODEL as VERSION after a quarter of the tokens, kills
# the server VICTIM after a half.
phase() {
  local name=$1 temperature=$2 model=$3 version=$4 victim=$5
  local all=$((prompts * samples * max_tokens)) before
  before=$(ask_state "s['counters']['tokens']")
  say "$name: $prompts prompts x $samples at temperature $temperature"
  start submit "$bin" submit --manager "$(manager)" -n $samples --max-tokens $max_tokens --temperature "$temperature" \
    --seed 7 --out "$run/$name.jsonl" "$run/$name.prompts.jsonl"
  until_true 120 "a quarter of the tokens" at_least "s['counters']['tokens']" $((before + all / 4))
  start publish "$bin" publish --manager "$(manager)" --number "$version" --json "$model"
  until_true 120 "version $version on both" serving "$version" 2
  until_true 120 "half of the tokens" at_least "s['counters']['tokens']" $((before + all / 2))
  say "$name: kill -9 of $victim, with $(ask_state "s['samples']['running']") samples running"
  kill_hard "$victim"
  wait "${pids[submit]}" || die "submit failed in $name"
  unset "pids[submit]"
  curl -sf "$(url)/state" >"$run/$name.state.json"
  wait "${pids[publish]}" || say "$name: publish did not settle on every engine, one of which is dead"
  unset "pids[publish]"
}

own() { "$python" "$here/check_sglang.py" own --prompts "$run/greedy.prompts.jsonl" --max-tokens $max_tokens "$@"; }

check() {
  local name=$1; shift
  "$python" "$here/check_sglang.py" check --prompts "$run/$name.prompts.jsonl" --max-tokens $max_tokens --n $samples \
    --weights "$model_a" "$model_b" "$model_a" --got "$run/$name.jsonl" --out "$run/$name.report.json" "$@" \
    >"$run/$name.check.log" 2>&1 || { failed+=("$stream/$name"); return 0; }
}

# --- one stream form --------------------------------------------------------------------------------

both_phases() {
  local port1 port2 flags=() name
  for name in greedy sampled; do
    # A key that came before is a repetition to the manager, and runs nothing.
    sed "s/\"key\": \"/&$name-/" "$out/prompts.jsonl" >"$run/$name.prompts.jsonl"
  done
  port1=$(free_port) port2=$(free_port)
  [[ $stream == incremental ]] && flags=(--incremental-streaming-output --stream-interval 8)
  say "$stream: two SGLang servers and a manager"
  serve engine1 "$port1" "${flags[@]}"
  # Answers are equally long: with equal batches both would often be between two waves of them.
  serve engine2 "$port2" --max-running-requests 11 "${flags[@]}"
  start manager "$bin" manager --listen 127.0.0.1:0 --announce "$run/manager.json" --state-dir "$run/state"
  until_true 300 "engine1" answers "$port1"
  until_true 300 "engine2" answers "$port2"
  own --url "http://127.0.0.1:$port2" --out "$run/own-0.jsonl" >&2
  attach agent1 "$port1"
  attach agent2 "$port2"
  until_true 120 "both engines attached" at_least "len(s['engines'])" 2

  phase greedy 0 "$model_b" 1 engine1
  own --url "http://127.0.0.1:$port2" --out "$run/own-1.jsonl" --after "$run/greedy.jsonl" --version 1 >&2

  say "$stream: engine1 comes back with its old weights; its agent never left"
  serve engine1 "$port1" "${flags[@]}"
  until_true 300 "engine1 at version 1 again" serving 1 2
  phase sampled 0.7 "$model_a" 2 engine2
  stop_all

  check greedy --temperature 0 --own "$run/own-0.jsonl" "$run/own-1.jsonl"
  check sampled --temperature 0.7
}

failed=()
"$python" "$here/check_sglang.py" prompts --models "$model_a" "$model_b" --count $prompts --max-tokens $max_tokens \
  --out "$out/prompts.jsonl" 2>"$out/prompts.log" >&2 || die "no prompts"
for stream in ${STREAMS:-cumulative incremental}; do
  run=$out/$stream
  mkdir -p "$run" "$staging/$stream"
  both_phases
done
"$python" - "$out" <<'PY'
import json, pathlib, sys
for path in sorted(pathlib.Path(sys.argv[1]).glob("*/*.report.json")):
    report = json.loads(path.read_text())
    moved, reference = report["movement"], report["reference"]
    print(f"{path.parent.name}/{path.name.split('.')[0]}:", json.dumps({**moved, **report.get("own", {}), **reference, "missed": report["missed"]}))
PY
((${#failed[@]} == 0)) || die "missed: ${failed[*]}"
say "all gates hold; reports: $out/*/*.report.json"
