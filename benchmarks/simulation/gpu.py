"""How fast do clients train on one GPU, beside transformers' Trainer with PEFT, and beside Flower's published pattern?

    bash benchmarks/simulation/gpu.sh                         # on a machine with a GPU: at most eight minutes
    python benchmarks/simulation/gpu.py --base SmolLM2-135M   # one base
    python benchmarks/simulation/gpu.py --base demo --device cpu --steps 2 --tokens 256     # tries the program

A client takes five steps of LoRA (rank 16, all linear layers, AdamW) on random examples of 128 tokens. "fedtune" trains
clients one after another, "fedtune, K together" K of them in one pass, each with the tokens of the row. "Trainer +
PEFT" is one model that is kept, "published pattern" loads, quantizes and wraps it for each client, as Flower's example
for language models does. Each row is a process of its own; its first client is not measured. Ratios are of seconds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from workload import ALPHA, LEARNING_RATE, RANK

from fedtune.client.torch.side_by_side import train_together
from fedtune.client.torch.torch_trainer import TorchTrainer
from fedtune.client.trainer import ClientTask, LocalTask
from fedtune.core.job.local_work import TrainingSettings, local_work
from fedtune.core.job.settings import AdapterSettings, ModelSettings
from fedtune.data.examples import Example
from fedtune.demo import BASE_DIRECTORY
from fedtune.model.adapted_model import adapt
from fedtune.model.base_model import load_base

LENGTH, VOCABULARY = 128, 250
PEERS = ("Trainer + PEFT, NF4", "Trainer + PEFT, bf16", "published pattern")
OURS = "fedtune"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="a model's directory, or demo")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048], help="tokens of a client's step")
    parser.add_argument("--together", type=int, nargs="+", default=[8, 32], help="clients in a pass")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--clients", type=int, default=3, help="measured clients, or passes, of each row")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(measured(options.way, options.tokens[0], options)))
        return
    print("| way | tokens a step | seconds a client | tokens/s | against the pattern | against Trainer + PEFT, NF4 |")
    print("| --- | --- | --- | --- | --- | --- |")
    for tokens in options.tokens:
        rows = {way: row(way, tokens) for way in (*PEERS, OURS, *(f"{OURS}, {k} together" for k in options.together))}
        for way, seconds in rows.items():
            ratios = [_ratio(rows[peer], seconds) for peer in ("published pattern", "Trainer + PEFT, NF4")]
            speed = f"{seconds:.3f} | {tokens * options.steps / seconds:,.0f}" if seconds else "failed |"
            print(f"| {way} | {tokens} | {speed} | {' | '.join(ratios)} |", flush=True)


def row(way: str, tokens: int) -> float | None:
    """Measures in a process of its own; returns the seconds of a client, None where the way does not work here."""
    command = [sys.executable, __file__, *sys.argv[1:], "--way", way, "--tokens", str(tokens)]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    return float(json.loads(done.stdout.splitlines()[-1])) if done.returncode == 0 else None


def measured(way: str, tokens: int, options: argparse.Namespace) -> float:
    """Returns the seconds of a client's training, the mean of all but the first."""
    base = str(BASE_DIRECTORY) if options.base == "demo" else options.base
    random = np.random.default_rng(0)
    batch = [random.integers(5, VOCABULARY, LENGTH, dtype=np.int32) for _ in range(tokens // LENGTH * options.steps)]
    at_once = int(way.split()[1]) if "together" in way else 1
    client = fedtune_clients(base, batch, tokens, at_once, options) if OURS in way else peer(way, base, batch, options)
    client()
    start = time.perf_counter()
    for _ in range(options.clients):
        client()
        if options.device == "cuda":
            torch.cuda.synchronize()
    count: int = options.clients * at_once
    return (time.perf_counter() - start) / count


def fedtune_clients(base: str, batch: list[Any], tokens: int, at_once: int, options: argparse.Namespace) -> Any:
    """Returns a function that trains so many clients, in one pass where there are several."""
    loaded = load_base(ModelSettings(base), device=options.device)
    trainer = TorchTrainer(adapt(loaded, AdapterSettings(kind="lora", rank=RANK, alpha=ALPHA)))
    settings = TrainingSettings(
        learning_rate=LEARNING_RATE, local_steps=options.steps, batch_tokens=tokens, optimizer="adamw"
    )
    examples = [Example(ids, 1) for ids in batch]
    received = trainer.layout.initial(0)
    tasks = [ClientTask(examples, received, LocalTask(seed, local_work(settings))) for seed in range(at_once)]
    if at_once > 1:
        return lambda: train_together(trainer.model, tasks)
    return lambda: trainer.train(examples, received, tasks[0].task)


def peer(way: str, base: str, batch: list[Any], options: argparse.Namespace) -> Callable[[], Any]:
    """Returns a function that trains one client with transformers' Trainer."""
    if way == "published pattern":
        return lambda: _train(_peft_model(base, True, options.device), batch, options)
    model = _peft_model(base, "NF4" in way, options.device)
    return lambda: _train(model, batch, options)


def _peft_model(base: str, quantized: bool, device: str) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    nf4 = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    network: Any = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=nf4 if quantized else None, dtype=torch.bfloat16, device_map=device
    )
    return get_peft_model(network, LoraConfig(r=RANK, lora_alpha=int(ALPHA), target_modules="all-linear"))


def _train(model: Any, batch: list[Any], options: argparse.Namespace) -> None:
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": ids.astype(np.int64), "labels": ids.astype(np.int64)} for ids in batch]
    arguments = TrainingArguments(
        output_dir="unused",
        max_steps=options.steps,
        per_device_train_batch_size=len(batch) // options.steps,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        use_cpu=options.device == "cpu",
        bf16=True,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    Trainer(model=model, args=arguments, train_dataset=rows).train()


def _ratio(peer_seconds: float | None, seconds: float | None) -> str:
    return f"{peer_seconds / seconds:.2f}x" if peer_seconds and seconds else ""


if __name__ == "__main__":
    main()
