"""How fast is a training step with onnxruntime, and how much memory does it take, beside torch?

    fedtune edge pack demo --out packs/demo
    python benchmarks/edge/trainers.py --base demo --pack packs/demo
    python benchmarks/edge/trainers.py --base demo --pack packs/demo --tokens 64 128 256 --threads 1 2

Each trainer takes the same steps, of one example of random tokens each, in a process of its own: LoRA of rank 8 on all
linear layers, float32. Memory is the process's peak resident set, mapped weights included; with --limit
MB it is the peak of a control group of that size, file pages included, which the pack's files enter from the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Literal

import numpy as np

from fedtune.client.trainer import Limits, LocalTask, Trainer
from fedtune.core.job.local_work import TrainingSettings, local_work
from fedtune.core.job.settings import AdapterSettings, ModelSettings
from fedtune.data.examples import Example
from fedtune.edge.pack import open_pack

ADAPTER = AdapterSettings(rank=8)
TORCH: dict[str, Literal["packed", "dequantized"]] = {"torch, packed": "packed", "torch, dequantized": "dequantized"}
ONNX = {  # weights, and whether activations are computed again: the forms of a plan, from the largest to the smallest
    "onnxruntime, unpacked": ("unpacked", False),
    "onnxruntime": ("mapped", False),
    "onnxruntime, checkpointed": ("mapped", True),
}
TRAINERS = (*TORCH, *ONNX)
COLUMNS = ("trainer", "threads", "tokens", "seconds a step", "tokens/s", "peak memory, MB", "loss of all steps")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="demo", help="the base model's directory, or demo")
    parser.add_argument("--pack", type=Path, required=True, help="its edge pack")
    parser.add_argument("--tokens", type=int, nargs="+", default=[128], help="tokens of a step")
    parser.add_argument("--threads", type=int, nargs="+", default=[1], help="threads of a trainer")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--limit", type=int, metavar="MB", help="memory of a control group, without swap, for each")
    parser.add_argument("--only", choices=TRAINERS, action="append", help="one trainer; may be given again")
    parser.add_argument("--trainer", choices=TRAINERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.trainer:
        print(json.dumps(measured(options)))
        return
    print("\n".join(f"| {' | '.join(cells)} |" for cells in (COLUMNS, ("---",) * len(COLUMNS))))
    for threads, tokens, trainer in product(options.threads, options.tokens, options.only or TRAINERS):
        row = (trainer, str(threads), str(tokens))
        one = ("--trainer", trainer, "--threads", str(threads), "--tokens", str(tokens))
        command = [sys.executable, __file__, *sys.argv[1:], *one]
        done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
        if options.limit:
            group_of(os.getpid()).rmdir()
        if done.returncode:
            print(f"| {' | '.join(row)} | ended with status {done.returncode} | | | |", flush=True)
            continue
        seconds, megabytes, loss = json.loads(done.stdout)
        cells = (*row, f"{seconds:.3f}", f"{tokens / seconds:.0f}", f"{megabytes:.0f}", f"{loss:.6f}")
        print(f"| {' | '.join(cells)} |", flush=True)


def measured(options: argparse.Namespace) -> tuple[float, float, float]:
    """Returns the seconds of a step, the mean of all but the first call's; the peak memory in MB; and the loss."""
    group = limited(options.pack, options.limit * 1_000_000) if options.limit else None
    trainer = open_trainer(options)
    random = np.random.default_rng(0)
    (tokens,) = options.tokens
    vocabulary = open_pack(options.pack).facts.shape.vocabulary
    examples = [
        Example(random.integers(0, vocabulary, tokens, dtype=np.int32), tokens // 2) for _ in range(options.steps)
    ]
    received = trainer.layout.initial(0)
    first, whole = (
        TrainingSettings(local_steps=steps, learning_rate=1e-3, batch_tokens=tokens) for steps in (1, options.steps)
    )
    trainer.train(examples, received, LocalTask(0, local_work(first)))
    result = trainer.train(examples, received, LocalTask(0, local_work(whole)))
    if group is not None:
        return result.seconds / result.steps, int((group / "memory.max_usage_in_bytes").read_text()) / 1e6, result.loss
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    return result.seconds / result.steps, peak * 1024 / 1e6, result.loss


def limited(pack: Path, size: int) -> Path:
    """Moves this process into a new control group (version 1) of that size, with the pack's files out of memory."""
    group = group_of(os.getppid())
    group.mkdir()
    (group / "memory.limit_in_bytes").write_text(str(size))
    for path in pack.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    (group / "cgroup.procs").write_text(str(os.getpid()))
    return group


def group_of(process: int) -> Path:
    """Returns the control group in which a benchmark's trainers run, one at a time."""
    return Path("/sys/fs/cgroup/memory") / f"fedtune-benchmark-{process}"


def open_trainer(options: argparse.Namespace) -> Trainer:
    (threads,) = options.threads
    if options.trainer in ONNX:
        from fedtune.client.onnx import onnx_trainer

        weights, checkpointing = ONNX[options.trainer]
        trainer = onnx_trainer.open_trainer(options.pack, ADAPTER, threads=threads, unpacked=weights == "unpacked")
        trainer.limits = Limits(checkpointing=checkpointing)
        return trainer
    import torch

    from fedtune.client.torch.torch_trainer import TorchTrainer
    from fedtune.model.adapted_model import adapt
    from fedtune.model.base_model import load_base

    torch.set_num_threads(threads)
    base = load_base(ModelSettings(options.base), precision="fp32", weights=TORCH[options.trainer])
    return TorchTrainer(adapt(base, ADAPTER))


if __name__ == "__main__":
    main()
