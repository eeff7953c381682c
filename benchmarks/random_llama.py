"""Makes a Llama of random parameters, for measurements whose figures don't depend on what a model knows.

python benchmarks/random_llama.py OUT --tokenizer SmolLM2-135M        # a base model's directory
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

SIZES = {"0.5B": (28, 1024, 4608, 16, 4), "1.1B": (22, 2048, 5632, 32, 4)}  # blocks, width, MLP, heads, key heads


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="DIR", help="a base model with the tokenizer")
    parser.add_argument("--size", choices=SIZES, default="0.5B")
    options = parser.parse_args()
    blocks, width, inner, heads, key_heads = SIZES[options.size]
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    network = LlamaForCausalLM(config).bfloat16()
    network.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    print(f"{options.out}: {network.num_parameters():,} parameters")


if __name__ == "__main__":
    main()
