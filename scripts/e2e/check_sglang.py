"""Checks what `anabranch submit` wrote against the engines themselves and against Hugging Face in float32.

    check_sglang.py prompts --models DIR.. --out FILE       choose prompts whose greedy answers do not loop
    check_sglang.py own --url URL --prompts FILE --out FILE [--after FILE --version N]
                                                            the server's own greedy answers, agent left out
    check_sglang.py check --prompts FILE --got FILE --weights DIR.. [--own FILE..] --out REPORT
                                                            the verdict; exit 1 where a gate is missed

Uses nothing of Anabranch: only the files that it wrote, the server's HTTP API, and the checkpoints.
`--weights` lists the checkpoint of version 0, 1, 2, in this order.
"""

import argparse
import json
import math
import random
import sys
import urllib.request
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path

# Where the best two tokens are nearer than this, float32 sums in another order may swap them.
TIE = 1e-4
# The same weights and tokens, summed in another order: what log-probabilities differ by.
LOGPROB_TOLERANCE = 1e-3
MIN_LABEL_AGREEMENT = 0.999
MAX_LOOPING = 0.05


def read(path):
    with open(path) as file:
        return [json.loads(line) for line in file]


def write(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def loops(tokens):
    """Whether the end is one short piece over and over: four times, and a dozen tokens at least."""
    for period in range(1, 17):
        seen = max(4 * period, 12)
        tail = tokens[-seen:]
        if len(tokens) >= seen and all(x == y for x, y in zip(tail, tail[period:])):
            return True
    return False


# --- choosing prompts -----------------------------------------------------------------------------


class Reference:
    """A checkpoint in Hugging Face, float32: the same for all tokens, whoever asks."""

    def __init__(self, directory):
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(1)
        self.torch = torch
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()

    def greedy(self, rows, count):
        """`rows` are equally long. The EOS is a token like others here."""
        torch = self.torch
        ids, cache, out = torch.tensor(rows), None, []
        with torch.inference_mode():
            for _ in range(count):
                step = self.model(ids, past_key_values=cache, use_cache=True)
                cache, ids = step.past_key_values, step.logits[:, -1:].argmax(-1)
                out.append(ids)
        return torch.cat(out, 1).tolist()

    def logprobs(self, prompt, tokens, temperature):
        """Of each of `tokens` after all before it; and what the likeliest one has."""
        torch = self.torch
        with torch.inference_mode():
            logits = self.model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        table = (logits / (temperature or 1.0)).log_softmax(-1)
        own = table.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        return own.tolist(), table.max(-1).values.tolist()


def prompts(args):
    """Random ids; kept where the greedy answer loops under neither model, nor over a change between them."""
    rng = random.Random(args.seed)
    models = [Reference(directory) for directory in args.models]
    chosen = []
    while len(chosen) < args.count:
        size = rng.randrange(10, 33)
        rows = [[rng.randrange(256) for _ in range(size)] for _ in range(256)]
        chosen += steady(models, rows, args.max_tokens)
    chosen = chosen[: args.count]
    write(args.out, [{"key": f"p{i:03}", "input_ids": ids} for i, ids in enumerate(chosen)])
    print(json.dumps({"prompts": len(chosen)}))


def steady(models, rows, count):
    for model in models:
        answers = model.greedy(rows, count)
        rows = [row for row, answer in zip(rows, answers) if not loops(answer)]
    first, last = models[0], models[-1]
    for seam in (count // 4, count // 2, 3 * count // 4):
        if not rows:
            break
        heads = first.greedy(rows, seam)
        tails = last.greedy([row + head for row, head in zip(rows, heads)], count - seam)
        rows = [row for row, head, tail in zip(rows, heads, tails) if not loops(head + tail)]
    return rows


# --- the server's own answers ---------------------------------------------------------------------


def ask(url, ids, count):
    """Greedy, with the gap between the best two at each position."""
    body = {
        "input_ids": ids,
        "sampling_params": {"temperature": 0, "max_new_tokens": count},
        "return_logprob": True,
        "top_logprobs_num": 2,
    }
    request = urllib.request.Request(
        url + "/generate", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        got = json.load(answer)
    meta = got["meta_info"]
    gaps = [best[0] - second[0] for best, second in meta["output_top_logprobs"]]
    logprobs = [entry[0] for entry in meta["output_token_logprobs"]]
    return {"tokens": got["output_ids"], "gaps": gaps, "logprobs": logprobs, "label": meta["weight_version"]}


def own(args):
    """Of each prompt at its start; with --after, of each stretch that version N made in a trajectory."""
    given = {row["key"]: row["input_ids"] for row in read(args.prompts)}
    wanted = {}
    if args.after:
        for row in read(args.after):
            for version, start, stop in stretches(row):
                if version == args.version:
                    wanted[row["key"], tuple(row["tokens"][:start])] = args.max_tokens - start
    else:
        wanted = {(key, ()): args.max_tokens for key in given}
    with ThreadPoolExecutor(12) as pool:
        answer = lambda item: ask(args.url, given[item[0][0]] + list(item[0][1]), item[1])
        answers = list(pool.map(answer, wanted.items()))
    rows = [
        {"key": key, "version": args.version, "kept": list(kept), **answer}
        for (key, kept), answer in zip(wanted, answers)
    ]
    write(args.out, rows)
    labels = Counter(row["label"] for row in rows)
    print(json.dumps({"asked": len(rows), "labels": labels}))


# --- the verdict ----------------------------------------------------------------------------------


def stretches(row):
    """(version, start, stop) where neighbouring spans of one version are one."""
    at = 0
    for version, spans in groupby(row["spans"], key=lambda span: span["version"]):
        count = sum(span["len"] for span in spans)
        yield version, at, at + count
        at += count


def shape(got, given, args):
    """What must hold of every trajectory, whatever the weights."""
    wrong = []
    times = Counter((row["key"], row["index"]) for row in got)
    expected = {(key, index) for key in given for index in range(args.n)}
    wrong += [f"{sample} is missing" for sample in sorted(expected - times.keys())]
    wrong += [f"{sample} came {count} times" for sample, count in times.items() if count > 1]
    wrong += [f"{sample} was not asked for" for sample in sorted(times.keys() - expected)]
    for row in got:
        name, size, at = (row["key"], row["index"]), len(row["tokens"]), 0
        for span in row["spans"]:
            if span["start"] != at or span["len"] < 1:
                wrong.append(f"{name}: spans do not tile at {at}")
            at = span["start"] + span["len"]
        if at != size or len(row["logprobs"]) != size:
            wrong.append(f"{name}: {size} tokens, spans to {at}, {len(row['logprobs'])} log-probabilities")
        ended = "stop" if args.eos in row["tokens"] else "length"
        if args.eos in row["tokens"][:-1]:
            wrong.append(f"{name}: goes on after the EOS")
        if row["finish"] != ended or (ended == "length" and size != args.max_tokens):
            wrong.append(f"{name}: {row['finish']} after {size} tokens")
    return wrong


def movement(got):
    """How many samples changed their engine or their weights, with how many tokens in hand."""
    out = {"samples": len(got), "tokens": 0, "moved": 0, "kept_tokens": 0, "changed_version": 0, "discarded_tokens": 0}
    versions = Counter()
    for row in got:
        out["tokens"] += len(row["tokens"])
        out["discarded_tokens"] += row["discarded_tokens"]
        homes = [(span["engine"], span["incarnation"]) for span in row["spans"]]
        seams = [span["start"] for span, home, before in zip(row["spans"][1:], homes[1:], homes) if home != before]
        out["moved"] += bool(seams)
        out["kept_tokens"] += seams[0] if seams else 0
        out["changed_version"] += len(set(row["versions"])) > 1
        for span in row["spans"]:
            versions[span["version"]] += span["len"]
    out["tokens_of_version"] = dict(sorted(versions.items()))
    siblings = defaultdict(set)
    for row in got:
        siblings[row["key"]].add(tuple(row["tokens"]))
    out["distinct_answers"] = sum(map(len, siblings.values()))
    out["looping"] = sum(loops(row["tokens"]) for row in got)
    return out


def against_own(got, answers):
    """Greedy: each stretch beside what the server says when it is asked for that stretch alone."""
    known = {(a["key"], a["version"], tuple(a["kept"])): a for a in answers}
    out = Counter(stretches=0, compared=0, ties=0, after_a_tie=0, differing=0, unknown=0)
    worst, examples = 0.0, []
    for row in got:
        for version, start, stop in stretches(row):
            out["stretches"] += 1
            answer = known.get((row["key"], version, tuple(row["tokens"][:start])))
            if answer is None:
                out["unknown"] += 1
                continue
            for at in range(start, stop):
                step = at - start
                if step < len(answer["tokens"]) and row["tokens"][at] == answer["tokens"][step]:
                    out["compared"] += 1
                    worst = max(worst, abs(row["logprobs"][at] - answer["logprobs"][step]))
                    continue
                tie = step < len(answer["tokens"]) and answer["gaps"][step] < TIE
                out["ties" if tie else "differing"] += 1
                out["after_a_tie"] += stop - at - 1
                if not tie:
                    examples.append([row["key"], row["index"], version, at])
                break
    return {**out, "logprob_error_max": worst, "examples": examples[:10]}


def against_reference(got, given, args):
    """Which of the versions around a token gives it the log-probability that came with it."""
    models = {directory: Reference(directory) for directory in dict.fromkeys(args.weights)}
    total = best = not_likeliest = 0
    errors, gaps, examples = [], [], []
    for row in got:
        tokens = row["tokens"]
        made = {d: m.logprobs(given[row["key"]], tokens, args.temperature) for d, m in models.items()}
        for version, start, stop in stretches(row):
            label = args.weights[version]
            around = set(args.weights[max(version - 1, 0) : version + 2])
            for at in range(start, stop):
                said = row["logprobs"][at]
                off = {d: abs(said - made[d][0][at]) for d in around}
                total += 1
                errors.append(off[label])
                gaps.append(max(abs(made[d][0][at] - made[label][0][at]) for d in around))
                if off[label] <= min(off.values()) and math.isfinite(said):
                    best += 1
                else:
                    examples.append([row["key"], row["index"], version, at, said])
                likeliest = made[label][1][at] - made[label][0][at]
                not_likeliest += args.temperature == 0 and likeliest >= TIE
    errors.sort()
    gaps.sort()
    return {
        "tokens": total,
        "label_is_best": best,
        "label_agreement": best / max(total, 1),
        "logprob_error_p999": errors[int(0.999 * (total - 1))],
        "logprob_error_max": errors[-1],
        "gap_between_versions_median": gaps[total // 2],
        "greedy_not_likeliest": not_likeliest,
        "examples": examples[:10],
    }


def check(args):
    given = {row["key"]: row["input_ids"] for row in read(args.prompts)}
    got = read(args.got)
    wrong = shape(got, given, args)
    moved = movement(got)
    reference = against_reference(got, given, args)
    report = {"temperature": args.temperature, "movement": moved, "reference": reference}
    missed = wrong[:10]
    if not moved["moved"]:
        missed.append("no sample moved: the kill came too early or too late")
    if not moved["changed_version"]:
        missed.append("no sample changed its version: the publish came too early or too late")
    if reference["label_agreement"] < MIN_LABEL_AGREEMENT:
        missed.append(f"label agreement {reference['label_agreement']:.5f} < {MIN_LABEL_AGREEMENT}")
    if reference["logprob_error_p999"] > LOGPROB_TOLERANCE:
        missed.append(f"log-probabilities are off by {reference['logprob_error_p999']:.2g}")
    if args.own:
        answers = [answer for path in args.own for answer in read(path)]
        greedy = report["own"] = against_own(got, answers)
        if greedy["differing"] or greedy["unknown"] or reference["greedy_not_likeliest"]:
            missed.append("greedy answers differ from the server's own")
        if moved["looping"] > MAX_LOOPING * len(got):
            missed.append(f"{moved['looping']} of {len(got)} greedy answers loop")
    report["missed"] = missed
    Path(args.out).write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))
    return 1 if missed else 0


def arguments():
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = top.add_subparsers(dest="what", required=True)
    for name, does in (("prompts", prompts), ("own", own), ("check", check)):
        command = sub.add_parser(name)
        command.set_defaults(does=does)
        command.add_argument("--out", required=True)
        command.add_argument("--max-tokens", type=int, default=64)
        if name == "prompts":
            command.add_argument("--models", nargs="+", required=True)
            command.add_argument("--count", type=int, default=64)
            command.add_argument("--seed", type=int, default=1)
            continue
        command.add_argument("--prompts", required=True)
        if name == "own":
            command.add_argument("--url", required=True)
            command.add_argument("--after", help="trajectories: ask for the stretches of --version in them")
            command.add_argument("--version", type=int, default=0)
        else:
            command.add_argument("--got", required=True)
            command.add_argument("--weights", nargs="+", required=True)
            command.add_argument("--own", nargs="*", default=[])
            command.add_argument("--n", type=int, default=4)
            command.add_argument("--temperature", type=float, required=True)
            command.add_argument("--eos", type=int, default=256)
    return top.parse_args()


if __name__ == "__main__":
    chosen = arguments()
    sys.exit(chosen.does(chosen) or 0)
