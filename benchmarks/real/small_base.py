"""Pretrains the small base of benchmarks/real: a Llama of 5.6 million parameters, on WordNet's glosses.

    python benchmarks/real/small_base.py OUT                     # about twenty minutes on two idle cores
    python benchmarks/real/small_base.py OUT --wordnet FOLDER

The text is every word with its whole gloss, once, in a fixed random order; three passes over its 3.1 million tokens. No
topic is in it, so the base knows how glosses read, and nothing of the task. The same machine, threads and versions give
the same files. A checkpoint is written twice a minute; a second call goes on from it.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

EXAMPLE = Path(__file__).parents[2] / "examples" / "real-model"
sys.path.append(str(EXAMPLE))  # the example reads WordNet
import wordnet  # noqa: E402

VOCABULARY = 4096
PAD, END = "<pad>", "<eos>"
LENGTH, SEQUENCES = 128, 64  # tokens of a sequence, and sequences of a step
EPOCHS = 3
PEAK_RATE, LAST_SHARE, WARM_UP = 2e-3, 0.05, 50  # learning rate, the share of it at the end, steps until its peak
WEIGHT_DECAY, BETAS, LONGEST_GRADIENT = 0.05, (0.9, 0.95), 1.0
TEXT_SEED, WEIGHT_SEED, BATCH_SEED = 5, 0, 1
SECONDS_BETWEEN_CHECKPOINTS = 30.0
CHECKPOINT = "pretraining.pt"  # removed at the end


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--wordnet", type=Path, metavar="FOLDER", help="the folder that holds data.noun")
    parser.add_argument("--epochs", type=float, default=EPOCHS)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    if (options.out / "model.safetensors").is_file():
        parser.exit(0, f"{options.out}: the model is there already\n")
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        texts = read_texts(wordnet.find(options.wordnet, options.out))
    except (OSError, ValueError) as error:
        parser.exit(2, f"{error}\n")
    tokenizer = build_tokenizer(texts)
    tokens = tokenize(tokenizer, texts)
    model = build_model()
    print(f"{model.num_parameters():,} parameters, {len(tokens):,} tokens", flush=True)
    train(model, tokens, int(options.epochs * len(tokens) / (LENGTH * SEQUENCES)), options.out / CHECKPOINT)
    model.save_pretrained(options.out)
    wrapped(tokenizer).save_pretrained(options.out)
    (options.out / CHECKPOINT).unlink()


def read_texts(folder: Path) -> list[str]:
    """Returns each word with its whole gloss, in a fixed random order."""
    texts = [f"{entry.word}: {entry.gloss}" for entry in wordnet.entries(folder)]
    random.Random(TEXT_SEED).shuffle(texts)
    return texts


def build_tokenizer(texts: Sequence[str]) -> Tokenizer:
    """Trains byte-level BPE on the texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    # transformers gives its constructor no types
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, bos_token=END
    )


def tokenize(tokenizer: Tokenizer, texts: Sequence[str]) -> Tensor:
    """Returns all texts as one row of token ids, int64, each with its end."""
    end = tokenizer.token_to_id(END)
    ids = [token for encoding in tokenizer.encode_batch(texts) for token in [*encoding.ids, end]]
    return torch.tensor(ids)


def build_model() -> LlamaForCausalLM:
    torch.manual_seed(WEIGHT_SEED)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
    )
    return LlamaForCausalLM(config)


def train(model: LlamaForCausalLM, tokens: Tensor, steps: int, checkpoint: Path) -> None:
    """Trains for `steps` optimizer steps, from the checkpoint where there is one.

    Args:
        tokens: int64, shape (tokens,).
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, weight_decay=WEIGHT_DECAY, betas=BETAS, fused=True)
    batches = torch.Generator().manual_seed(BATCH_SEED)
    first = _restore(checkpoint, model, optimizer, batches)
    begun = saved = time.monotonic()
    for step in range(first, steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        starts = torch.randint(0, len(tokens) - LENGTH - 1, (SEQUENCES,), generator=batches)
        batch = torch.stack([tokens[start : start + LENGTH] for start in starts.tolist()])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), LONGEST_GRADIENT)
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.monotonic() - begun
        left = seconds / (step + 1 - first) * (steps - step - 1)
        end = "\n" if step + 1 == steps else "\r"
        print(f"  step {step + 1}/{steps}, loss {loss.item():.3f}, {left:.0f} s left ", end=end, flush=True)
        if time.monotonic() - saved > SECONDS_BETWEEN_CHECKPOINTS:
            _save(checkpoint, step + 1, model, optimizer, batches)
            saved = time.monotonic()
    _save(checkpoint, steps, model, optimizer, batches)


def learning_rate(step: int, steps: int) -> float:
    """Returns a cosine from the peak to a small share of it, after a linear rise."""
    wave = 0.5 * (1 + math.cos(math.pi * step / steps))
    return PEAK_RATE * min(1.0, (step + 1) / WARM_UP) * (wave * (1 - LAST_SHARE) + LAST_SHARE)


def _save(path: Path, step: int, model: Any, optimizer: torch.optim.Optimizer, batches: torch.Generator) -> None:
    draft = path.with_suffix(".draft")
    state = {
        "step": step,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "batches": batches.get_state(),
    }
    torch.save(state, draft)
    draft.replace(path)


def _restore(path: Path, model: Any, optimizer: torch.optim.Optimizer, batches: torch.Generator) -> int:
    """Returns the number of steps that are done."""
    if not path.is_file():
        return 0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    batches.set_state(state["batches"])
    return int(state["step"])


if __name__ == "__main__":
    main()
