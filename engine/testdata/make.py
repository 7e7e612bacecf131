"""Writes the tiny checkpoints of the engine's tests and what Hugging Face says about them in float32.

Usage: make.py   (needs torch and transformers; writes into its own folder, same bytes for the same versions)
The weights are wider than a fresh initialisation, so that the distributions are far from uniform.
"""
import json
import pathlib

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

HERE = pathlib.Path(__file__).parent
PROMPTS = [[5], [17, 3, 99, 4], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12], [100, 100, 100, 64, 64, 2, 90]]
NEW = 24
COMMON = dict(vocab_size=128, num_hidden_layers=2, max_position_embeddings=256, eos_token_id=0, bos_token_id=1)
MODELS = {
    # Grouped heads, biases on q, k and v, an output head of its own, bf16.
    "qwen2": (
        Qwen2ForCausalLM,
        Qwen2Config(hidden_size=48, intermediate_size=80, num_attention_heads=4, num_key_value_heads=2,
                    tie_word_embeddings=False, **COMMON),
        torch.bfloat16, "5GB",
    ),
    # Tied embeddings, another rope base, f32 in several shards.
    "llama": (
        LlamaForCausalLM,
        LlamaConfig(hidden_size=32, intermediate_size=72, num_attention_heads=4, num_key_value_heads=1,
                    tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
                    rms_norm_eps=1e-5, **COMMON),
        torch.float32, "40KB",
    ),
    # Norms on q and k, a head size that is not hidden / heads, f16.
    "qwen3": (
        Qwen3ForCausalLM,
        Qwen3Config(hidden_size=40, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
                    tie_word_embeddings=True, **COMMON),
        torch.float16, "5GB",
    ),
}


def greedy(model, prompt):
    ids, logprobs = list(prompt), []
    for _ in range(NEW):
        row = torch.log_softmax(model(torch.tensor([ids])).logits[0, -1].float(), -1)
        token = int(row.argmax())
        ids.append(token)
        logprobs.append(round(float(row[token]), 7))
    return {"prompt": prompt, "ids": ids[len(prompt):], "logprobs": logprobs}


def main():
    for name, (kind, config, dtype, shard) in MODELS.items():
        torch.manual_seed(sum(map(ord, name)))
        model = kind(config)
        for key, value in model.named_parameters():
            if "norm" in key:
                value.data.uniform_(0.5, 1.5)
            else:
                value.data.normal_(0.0, 0.35 if "embed" in key else 0.25)
        out = HERE / name
        model.to(dtype).save_pretrained(out, safe_serialization=True, max_shard_size=shard)
        with torch.no_grad():
            model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, attn_implementation="eager").eval()
            cases = [greedy(model, prompt) for prompt in PROMPTS]
        (out / "reference.json").write_text(json.dumps({"greedy": cases}) + "\n")
        print(name, [round(sum(case["logprobs"]) / NEW, 3) for case in cases], [len(set(case["ids"])) for case in cases])


main()
