"""How far is a plan's predicted peak memory from that of one real training step?

Cases: {nf4 packed, bf16} × {checkpointing off, on} × two sequence lengths, on the bundled model and on a Llama of 100
million random weights, each in its own process. The prediction is the bare formula, without this machine's κ. Memory is
the growth of the resident set, over the same process with all libraries loaded and warmed up; "loading" is its peak
while the model is read and packed, "training" its peak over five optimizer steps.

    python benchmarks/plan/run.py                     # about five minutes on two cores
    python benchmarks/plan/run.py --models demo --dry
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import os
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedtune.client.plan.backend import Case, Measured
from fedtune.client.plan.step_costs import Choices, MemoryPrediction, predict_memory
from fedtune.client.torch.trial_step import measure
from fedtune.core.job.settings import AdapterSettings, ModelSettings
from fedtune.model.shape import shape_of

HERE = Path(__file__).parent
RANK, ALPHA = 16, 32.0
TOKENS = 1024  # tokens of a micro-batch
LENGTHS = {"demo": (64, 256), "llama-100m": (128, 512)}
ALLOWED = 0.2
# 107 million parameters: 65 million in linear layers, 41 million in embeddings and head.
LLAMA: dict[str, Any] = {
    "hidden_size": 640,
    "intermediate_size": 1792,
    "num_hidden_layers": 14,
    "num_attention_heads": 10,
    "num_key_value_heads": 5,
    "head_dim": 64,
    "vocab_size": 32_000,
    "max_position_embeddings": 2048,
    "pad_token_id": 1,
    "bos_token_id": None,
    "eos_token_id": 0,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Outcome:
    """One case, predicted and measured."""

    model: str
    case: Case
    predicted: MemoryPrediction
    measured: Measured

    @property
    def error(self) -> float:
        """Returns the predicted peak over the measured one, minus 1."""
        return self.predicted.peak / self.measured.peak - 1

    def cells(self) -> list[str]:
        """Returns a row of the table."""
        loading, training, choices = self.predicted.loading, self.predicted.training, self.case.choices
        return [
            self.model,
            "nf4" if choices.weights == "packed" else choices.precision,
            "on" if choices.checkpointing else "off",
            f"{self.case.micro_batch} × {choices.sequence_length}",
            f"{_mb(loading)} / {_mb(self.measured.loading)}",
            f"{_mb(training)} / {_mb(self.measured.training)}",
            f"{_mb(self.predicted.peak)} / {_mb(self.measured.peak)}",
            f"{self.error:+.0%}",
            f"{self.measured.step_seconds:.2f}",
        ]


COLUMNS = ("model", "weights", "checkpointing", "batch", "loading", "training", "peak, MB", "error", "s a step")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(LENGTHS), default=list(LENGTHS))
    parser.add_argument("--dry", action="store_true", help="print the table, but leave RESULTS.md as it is")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        outcomes = [outcome for model in options.models for outcome in run_model(model, Path(folder))]
    table = format_table(outcomes)
    worst = max(abs(outcome.error) for outcome in outcomes)
    verdict = f"Largest error {worst:.0%}; allowed are {ALLOWED:.0%}."
    print(f"\n{table}\n\n{verdict}")
    if not options.dry:
        _write_results(table, verdict)
    sys.exit(worst > ALLOWED)


def run_model(model: str, folder: Path) -> list[Outcome]:
    """Runs all cases of one model."""
    base = "demo" if model == "demo" else str(make_llama(folder / model))
    shape = shape_of(ModelSettings(base))
    outcomes = []
    for weights, checkpointing, length in itertools.product(("packed", "dequantized"), (False, True), LENGTHS[model]):
        choices = Choices(weights, "bf16", RANK, length, TOKENS, checkpointing)  # type: ignore[arg-type]
        case = Case(ModelSettings(base), AdapterSettings(rank=RANK, alpha=ALPHA), choices)
        outcome = Outcome(model, case, predict_memory(shape, choices), measure(case))
        print("  ".join(outcome.cells()), flush=True)
        outcomes.append(outcome)
    return outcomes


def make_llama(directory: Path) -> Path:
    """Writes a Llama with random weights and the bundled model's tokenizer."""
    import transformers

    from fedtune.demo import BASE_DIRECTORY

    library: Any = transformers
    library.logging.disable_progress_bar()
    torch.manual_seed(0)
    network = library.AutoModelForCausalLM.from_config(library.LlamaConfig(**LLAMA), dtype=torch.bfloat16)
    network.save_pretrained(directory)
    library.AutoTokenizer.from_pretrained(BASE_DIRECTORY).save_pretrained(directory)
    return directory


def format_table(outcomes: Sequence[Outcome]) -> str:
    """Formats the outcomes as a Markdown table; memory columns are predicted / measured."""
    lines = [list(COLUMNS), ["---"] * len(COLUMNS), *(outcome.cells() for outcome in outcomes)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _mb(count: int) -> str:
    return f"{count / 1e6:.0f}"


def _write_results(table: str, verdict: str) -> None:
    command = shlex.join(["python", "benchmarks/plan/run.py", *sys.argv[1:]])
    machine = f"{os.cpu_count()} cores with {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"
    question = (__doc__ or "").splitlines()[0]
    text = [
        "# Predicted and measured memory of a plan",
        f"{question}",
        f"`{command}` on {datetime.date.today():%Y-%m-%d}: {machine}.",
        table,
        f"{verdict} Memory columns are predicted / measured, in MB, over the process before it loads the model.",
        (__doc__ or "").partition("\n\n")[2].strip(),
    ]
    (HERE / "RESULTS.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
