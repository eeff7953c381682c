"""Makes a Llama of 520 million random parameters, for measurements whose figures don't depend on what a model knows.

python benchmarks/edge/random_llama.py OUT --tokenizer SmolLM2-135M        # a base model's directory
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

BLOCKS, WIDTH, INNER, HEADS, KEY_HEADS = 28, 1024, 4608, 16, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="DIR", help="a base model with the tokenizer")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
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
