"""Trains the bundled base model from scratch: `python -m fedtune.demo.pretrain [--seed N] [--steps N] [--out DIR]`.

The tokenizer, byte-level BPE, and the weights are both trained on the text of `corpus`. A single thread adds in a fixed
order, so two runs with the same seed on the same kind of processor give the same files. Progress is printed; the last
lines are the figures of the model card.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from statistics import fmean

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedtune.demo import BASE_DIRECTORY
from fedtune.demo import vocabulary as words
from fedtune.demo.corpus import Document, draw_document, public_call
from fedtune.demo.households import make_evaluation
from fedtune.demo.skills import SEPARATOR

VOCABULARY = 1_792
CONTEXT = 256
"""Longest sequence, in tokens; a demo request with its call takes at most 64."""
DOCUMENTS = 40_000
WORD_REPEATS = 300
"""Number of times that the trainer sees each word alone, so that it becomes one token with and without a space."""
EOS = "</s>"
PAD = "<pad>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
    "{% elif message['content'].endswith('" + SEPARATOR + "') %}{{ message['content'] }}"
    "{% else %}{{ message['content'] + '" + SEPARATOR + "' }}{% endif %}{% endfor %}"
)
"""A user's turn becomes a prompt (`skills.format_prompt`), an assistant's turn a completion with its end."""


def build_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Trains byte-level BPE on the corpus; every digit is one token, and a word includes the space before it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d| ?[A-Za-z]+| ?[^\sA-Za-z\d]+|\s+"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    rng = random.Random(f"{seed}/tokenizer")
    documents = (draw_document(rng) for _ in range(DOCUMENTS))
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [text for document in documents for text in (document.prompt, document.completion)]
    known_words = [form for word in words.NOUNS + words.HOUSE_WORDS for form in (word, f" {word}")]
    tokenizer.train_from_iterator(texts + known_words * WORD_REPEATS, trainer)
    fast: PreTrainedTokenizerFast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD, model_max_length=CONTEXT, padding_side="right"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


WIDTH = 256
LAYERS = 3
HEADS = 4
MLP_WIDTH = 768
"""Dimensions of the Llama; widths are multiples of 64, the block that NF4 quantizes together."""
BATCH_DOCUMENTS = 32
BUCKET_BATCHES = 8
"""Documents are drawn for this many batches at once and sorted by length, so that batches carry little padding."""
STEPS = 3_000
WARMUP_STEPS = 100
REPORT_STEPS = 100
MATRIX_LEARNING_RATE = 5e-3
MATRIX_WEIGHT_DECAY = 0.2
"""A strong weight decay, so that weights stay small compared with an adapter's update."""
OTHER_LEARNING_RATE = 2e-3
GRADIENT_NORM = 1.0
MEASURED_CALLS = 400
PUBLIC_FILE = 0o644
IGNORED = -100
"""Label of positions without loss: prompts and padding."""


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """Returns a Llama with tied embeddings and random float32 weights."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=MLP_WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def batches(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields (tokens, labels) without end, both int64 of shape [BATCH_DOCUMENTS, longest document]."""
    rng = random.Random(f"{seed}/pretraining")
    while True:
        documents = [draw_document(rng) for _ in range(BATCH_DOCUMENTS * BUCKET_BATCHES)]
        encoded = sorted((_encode(tokenizer, document) for document in documents), key=lambda pair: len(pair[0]))
        cut = [encoded[start : start + BATCH_DOCUMENTS] for start in range(0, len(encoded), BATCH_DOCUMENTS)]
        rng.shuffle(cut)
        for batch in cut:
            yield _collate(tokenizer, batch)


Encoded = tuple[list[int], list[int]]
"""Token ids of a document, and its labels."""


def _encode(tokenizer: PreTrainedTokenizerFast, document: Document) -> Encoded:
    prompt = tokenizer.encode(document.prompt) if document.prompt else []
    completion = [*tokenizer.encode(document.completion), tokenizer.eos_token_id]
    return prompt + completion, [IGNORED] * len(prompt) + completion


def _collate(tokenizer: PreTrainedTokenizerFast, encoded: Sequence[Encoded]) -> tuple[Tensor, Tensor]:
    tokens = [torch.tensor(ids) for ids, _ in encoded]
    labels = [torch.tensor(targets) for _, targets in encoded]
    pad = torch.nn.utils.rnn.pad_sequence
    return (
        pad(tokens, batch_first=True, padding_value=tokenizer.pad_token_id),
        pad(labels, batch_first=True, padding_value=IGNORED),
    )


def completion_loss(model: LlamaForCausalLM, tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the mean cross-entropy of the labelled tokens, and per sequence whether every one of them is the argmax.

    Under teacher forcing the greedy continuation is correct up to the first wrong argmax, so "every argmax is correct,
    end-of-sequence included" is exactly "greedy decoding gives this completion", at the cost of one forward pass.
    Padding is at the end, so causal attention never sees it and no mask is needed.
    """
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    targets = labels[:, 1:]
    labelled = targets != IGNORED
    matched = ((logits.argmax(-1) == targets) | ~labelled).all(-1)
    return functional.cross_entropy(logits[labelled].float(), targets[labelled]), matched


def schedule(step: int, steps: int) -> float:
    """Returns the factor of the peak learning rates: linear warm-up times a linear decay to zero at `steps`."""
    return min(1.0, (step + 1) / WARMUP_STEPS) * (1 - step / steps)


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int, seed: int) -> None:
    """Trains `model` in place; prints loss and exact match of the training batches.

    The layers' matrices use Muon (orthogonalised momentum, K. Jordan 2024, scaled to AdamW's update size): in a trial
    86% of public calls were correct after 410 steps, with AdamW 61% after 559. The other parameters use AdamW.
    """
    matrices = [parameter for name, parameter in model.named_parameters() if "layers." in name and parameter.ndim == 2]
    others = [parameter for name, parameter in model.named_parameters() if "layers." not in name or parameter.ndim != 2]
    optimizers: tuple[torch.optim.Optimizer, ...] = (
        torch.optim.Muon(
            matrices, MATRIX_LEARNING_RATE, weight_decay=MATRIX_WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, OTHER_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    )
    schedulers = [LambdaLR(optimizer, lambda step: schedule(step, steps)) for optimizer in optimizers]
    started = time.perf_counter()
    losses: list[float] = []
    matches: list[float] = []
    for step, (tokens, labels) in zip(range(steps), batches(tokenizer, seed), strict=False):
        with torch.autocast("cpu", torch.bfloat16):
            loss, matched = completion_loss(model, tokens, labels)
        model.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_NORM)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
        losses.append(loss.item())
        matches.append(matched.float().mean().item())
        if (step + 1) % REPORT_STEPS == 0:
            print(
                f"step {step + 1:>6}/{steps}  loss {fmean(losses):.4f}  exact match {fmean(matches):.3f}  "
                f"{time.perf_counter() - started:.0f} s",
                flush=True,
            )
            losses.clear()
            matches.clear()


def measure(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
    """Prints loss and exact match on public and federated calls, with the layers' weights as trained and in NF4."""
    rng = random.Random(f"{seed}/measure")
    public = [public_call(rng) for _ in range(MEASURED_CALLS)]
    federated = [Document(row["prompt"], row["completion"]) for row in make_evaluation(MEASURED_CALLS, seed)]
    for weights, measured in (("bf16", model), ("nf4", _quantized(model))):
        for skills, documents in (("public", public), ("federated", federated)):
            loss, matched = evaluate(measured, tokenizer, documents)
            print(f"{weights:>4} {skills:>9} calls: loss {loss:.4f}, exact match {matched:.3f}")


def evaluate(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, documents: Sequence[Document]
) -> tuple[float, float]:
    """Returns the mean loss of completion tokens and the exact match of greedy decoding, without gradients."""
    with torch.inference_mode():
        loss, matched = completion_loss(model, *_collate(tokenizer, [_encode(tokenizer, each) for each in documents]))
    return loss.item(), matched.float().mean().item()


def _quantized(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Returns a copy whose linear layers hold the dequantized values of NF4 (blocks of 64, double quantization)."""
    copy = deepcopy(model)
    for layer in copy.model.layers.modules():
        if isinstance(layer, torch.nn.Linear):
            packed, state = quantize_4bit(layer.weight.data, blocksize=64, compress_statistics=True, quant_type="nf4")
            layer.weight.data = dequantize_4bit(packed, state)
    return copy


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Writes bf16 weights and tokenizer to a folder beside `directory`, then moves it into place with its card."""
    draft = directory.with_name(directory.name + ".draft")
    shutil.rmtree(draft, ignore_errors=True)
    deepcopy(model).bfloat16().save_pretrained(draft)
    tokenizer.save_pretrained(draft)
    _name_tokenizer_class(draft / "tokenizer_config.json")
    card = directory / "README.md"
    if card.exists():
        shutil.copy(card, draft)
    for file in draft.iterdir():
        file.chmod(PUBLIC_FILE)
    shutil.rmtree(directory, ignore_errors=True)
    draft.rename(directory)


def _name_tokenizer_class(path: Path) -> None:
    """Replaces the tokenizer's class name: transformers 5 writes one that older releases and runtimes do not know."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Pretrain the bundled base model.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, default=BASE_DIRECTORY)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = build_tokenizer(arguments.seed)
    model = build_model(tokenizer, arguments.seed)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer):,} tokens")
    train(model, tokenizer, arguments.steps, arguments.seed)
    save(model, tokenizer, arguments.out)
    measure(LlamaForCausalLM.from_pretrained(arguments.out, dtype=torch.float32), tokenizer, arguments.seed)


if __name__ == "__main__":
    main()
