"""Writes a tiny Qwen2 checkpoint with weights drawn at random, and a tokenizer of single bytes.

    make_model.py OUT NAME      the weights depend on NAME only
"""

import sys
import zlib
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

EOS = "<|endoftext|>"
VOCAB = 320  # 256 bytes, EOS, and some ids without a text


def tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {text: index for index, text in enumerate([*alphabet, EOS])}
    raw = Tokenizer(models.BPE(vocab=ids, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=EOS, pad_token=EOS)


def model(name: str, eos: int) -> Qwen2ForCausalLM:
    torch.manual_seed(zlib.crc32(name.encode()))
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=eos,
        eos_token_id=eos,
    )
    return Qwen2ForCausalLM(config).to(torch.bfloat16)


def main() -> None:
    out, name = Path(sys.argv[1]), sys.argv[2]
    words = tokenizer()
    model(name, words.eos_token_id).save_pretrained(out)
    words.save_pretrained(out)
    # Other users may run the server: the weights are no secret.
    for file in out.iterdir():
        file.chmod(0o644)


if __name__ == "__main__":
    main()
