"""How fast is an exported model on a CPU, and how much memory does it need, against transformers on the merged model?

Models: the bundled demo, trained, which answers held-out requests; and a Llama of 107 million random weights, which
continues 256 random tokens by 64. Every contestant runs in its own process with the same prompts, greedily, with the
same number of threads; peak memory is that of the process with all libraries. The contestants run in turns, several
times; each prompt counts with its fastest answer, since a busy machine can only slow an answer down.

    python benchmarks/inference/run.py                     # about ten minutes on two cores
    python benchmarks/inference/run.py --run runs/demo-1   # with an existing demo run
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from fedtune.core.protocol.model_manifest import FORMATS, read_manifest

HERE = Path(__file__).parent
MODELS = ("demo", "llama-100m")
PEERS = {"transformers fp32": ["float32"], "transformers bf16": ["bfloat16"]}
PEER = "transformers fp32"
JUDGED = "llama-100m"
SPEED, MEMORY = 5.0, 0.4  # required speed and memory of int4 over the peer's, on the judged model
RESULTS = HERE / "RESULTS.md"
COLUMNS = (
    "model",
    "contestant",
    "decode, tokens/s",
    "decode, tokens/CPU s",
    "prefill, tokens/s",
    "first token, ms",
    "load, s",
    "peak memory, MB",
    "on disk, MB",
    "exact match",
    "tokens as transformers fp32",
)


@dataclass
class Contestant:
    """One row with its best figures so far."""

    model: str
    name: str
    command: list[str]
    directory: Path
    exact_match: float | None
    load: float = float("inf")
    peak: int = 0
    best: list[list[float]] = field(default_factory=list)
    answers: list[list[int]] = field(default_factory=list)

    def run(self) -> None:
        """Runs the contestant once more; keeps each prompt's fastest answer and the largest memory."""
        found = json.loads(subprocess.run(self.command, stdout=subprocess.PIPE, check=True).stdout)
        self.load, self.peak = min(self.load, found["load"]), max(self.peak, found["peak"])
        before = self.best or found["best"]
        self.best = [
            [min(pair) for pair in zip(*both, strict=True)] for both in zip(before, found["best"], strict=True)
        ]
        self.answers = found["answers"]

    @property
    def first(self) -> float:
        """Returns the seconds to the first token, as the mean of all prompts."""
        return sum(first for first, *_ in self.best) / len(self.best)

    @property
    def decode(self) -> float:
        """Returns the tokens per second after the first."""
        return self._tokens / sum(rest for _, rest, *_ in self.best)

    @property
    def decode_cpu(self) -> float:
        """Returns the tokens per second of CPU time, over all threads, after the first."""
        return self._tokens / sum(rest for *_, rest in self.best)

    @property
    def _tokens(self) -> int:
        return sum(len(said) - 1 for said in self.answers)

    def cells(self, peer: Contestant, prompt_tokens: int) -> list[str]:
        """Returns a row of the table."""
        size = sum(path.stat().st_size for path in self.directory.rglob("*") if path.is_file())
        return [
            self.model,
            self.name,
            f"{self.decode:,.0f}",
            f"{self.decode_cpu:,.0f}",
            f"{prompt_tokens / len(self.best) / self.first:,.0f}",
            f"{1000 * self.first:.1f}",
            f"{self.load:.1f}",
            f"{self.peak / 1e6:,.0f}",
            f"{size / 1e6:,.1f}",
            "" if self.exact_match is None else f"{self.exact_match:.1%}",
            f"{_agreement(self.answers, peer.answers):.0%}",
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--run", type=Path, help="a finished demo run; without one, the demo is simulated first")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--times", type=int, default=2, help="how often each contestant's process runs")
    parser.add_argument("--dry", action="store_true", help="print the table, but leave RESULTS.md as it is")
    options = parser.parse_args()
    rows, verdicts, reached = [], [], True
    with tempfile.TemporaryDirectory() as folder:
        for model in options.models:
            contestants = prepare(model, Path(folder) / model, options.run, options.threads)
            for _ in range(options.times):
                for contestant in contestants:
                    contestant.run()
            by_name = {contestant.name: contestant for contestant in contestants}
            prompts = json.loads((Path(folder) / model / "prompts.json").read_text())["prompts"]
            rows += [contestant.cells(by_name[PEER], sum(map(len, prompts))) for contestant in contestants]
            for cells in rows[-len(contestants) :]:
                print("  ".join(cells), flush=True)
            if model == JUDGED:
                verdict, reached = judge(by_name["int4"], by_name[PEER])
                verdicts.append(verdict)
            else:
                verdicts.append(load(by_name["int4"].directory))
    table = format_table(rows)
    print("\n" + "\n\n".join((table, *verdicts)))
    if not options.dry:
        _write_results(table, verdicts)
    sys.exit(not reached)


def prepare(model: str, folder: Path, run: Path | None, threads: int) -> list[Contestant]:
    """Exports the model in every format, in a child process, and returns the contestants."""
    folder.mkdir()
    extra = [str(run)] if run and model == "demo" else []
    subprocess.run([sys.executable, str(HERE / "prepare.py"), model, str(folder), *extra], check=True)
    child = [sys.executable, str(HERE / "contestant.py")]
    common = [str(folder / "prompts.json"), str(threads)]
    contestants = []
    for form in FORMATS:
        directory = folder / "onnx" / form
        found = read_manifest(directory).provenance["gate"]["exact_match"] if model == "demo" else None
        contestants.append(Contestant(model, form, [*child, "onnx", str(directory), *common], directory, found))
    merged = folder / "merged"
    reference = read_manifest(folder / "onnx" / FORMATS[0]).provenance["gate"]["reference_exact_match"]
    for name, dtype in PEERS.items():
        known = reference if model == "demo" and name == PEER else None
        command = [*child, "transformers", str(merged), *common, *dtype]
        contestants.append(Contestant(model, name, command, merged, known))
    return contestants


def judge(int4: Contestant, peer: Contestant) -> tuple[str, bool]:
    """Returns a sentence about whether int4 reaches its targets."""
    speed, memory = int4.decode / peer.decode, int4.peak / peer.peak
    text = (
        f"On {JUDGED}, int4 decodes at {speed:.1f} times the tokens/s of {PEER} (at least {SPEED:g} is wanted) "
        f"and takes {memory:.0%} of its peak memory (at most {MEMORY:.0%} is wanted)."
    )
    return text, speed >= SPEED and memory <= MEMORY


def load(model: Path) -> str:
    """Returns a sentence about the service that sixteen concurrent clients get for a minute."""
    done = subprocess.run(
        [sys.executable, str(HERE / "streams.py"), str(model), "--json"], stdout=subprocess.PIPE, check=True
    )
    found = json.loads(done.stdout)
    return (
        f"{found['streams']} clients that stream from `fedtune serve` on the demo's int4 for {found['seconds']:.0f} s "
        f"(`streams.py`): {found['requests']:,} answers, {len(found['errors'])} errors, "
        f"{found['tokens_per_second']:,.0f} tokens/s; {found['tokens_least']:,} to {found['tokens_most']:,} tokens a "
        f"client; the server's memory was {found['memory_mb_settled']:.0f} MB after a fifth of the time and "
        f"{found['memory_mb_largest']:.0f} MB at most; a client that went away held its slot for "
        f"{found['slot_freed_seconds']:.3f} s at most."
    )


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Formats the rows as a Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (COLUMNS, ["---"] * len(COLUMNS), *rows))


def _agreement(answers: list[list[int]], peer: list[list[int]]) -> float:
    """Returns the share of the peer's tokens that an answer repeats before it first differs."""
    same = 0
    for ours, theirs in zip(answers, peer, strict=True):
        same += next((at for at, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), len(theirs))
    return same / sum(map(len, peer))


def _write_results(table: str, verdicts: Sequence[str]) -> None:
    given = ["RUN_DIR" if before == "--run" else word for before, word in itertools.pairwise(sys.argv)]
    command = shlex.join(["python", "benchmarks/inference/run.py", *given])
    versions = ", ".join(
        f"{name} {version(name)}" for name in ("onnxruntime-genai", "onnxruntime", "torch", "transformers")
    )
    text = [
        "# Speed and memory of an exported model on a CPU",
        (__doc__ or "").splitlines()[0],
        f"`{command}` on {datetime.date.today():%Y-%m-%d}: {os.cpu_count()} cores, {versions}.",
        table,
        *verdicts,
        (__doc__ or "").partition("\n\n")[2].strip(),
    ]
    RESULTS.write_text("\n\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
