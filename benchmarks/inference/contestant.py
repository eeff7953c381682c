"""One contestant in its own process, which loads a model, answers the prompts and prints time and memory as JSON.

    python benchmarks/inference/contestant.py onnx DIRECTORY PROMPTS.json THREADS
    python benchmarks/inference/contestant.py transformers DIRECTORY PROMPTS.json THREADS [bfloat16]

PROMPTS.json holds {"prompts": [[token, ...], ...], "tokens": number of tokens to generate}; decoding is greedy. Peak
memory is that of the process with all libraries, which a device must have.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPEATS = 3  # of each prompt, of which the fastest counts
Ids = list[int]
Moment = tuple[float, float]
"""Seconds of the wall clock, and of this process's CPU time over all threads."""
Answer = Callable[[Ids, int], tuple[list[Moment], Ids]]
"""A function: prompt, number of tokens -> the times of the tokens, and the tokens."""


def onnx(directory: Path, threads: int) -> Answer:
    """Runs the model as `fedtune serve` does."""
    from fedtune.client.inference.exported_model import ExportedModel, Sampling, read
    from fedtune.client.inference.scheduler import PREFILL_PIECE

    model = ExportedModel(directory, threads=threads)

    def answer(prompt: Ids, tokens: int) -> tuple[list[Moment], Ids]:
        generator = model.generator(len(prompt), Sampling(tokens))
        for begin in range(0, len(prompt), PREFILL_PIECE):
            read(generator, prompt[begin : begin + PREFILL_PIECE])
        moments: list[Moment] = []
        said: Ids = []
        while len(said) < tokens and (not said or said[-1] not in model.end_tokens):
            generator.generate_next_token()
            said.append(int(generator.get_next_tokens()[0]))
            moments.append(now())
        return moments, said

    return answer


def transformers(directory: Path, threads: int, dtype: str) -> Answer:
    """Runs `generate` on the merged model."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    loaded: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype), local_files_only=True)
    network = loaded.eval()

    class Clock:
        """A streamer that takes the prompt first, then each token, and records their times."""

        def __init__(self) -> None:
            self.moments: list[Moment] = []
            self.said: Ids = []
            self._prompt = True

        def put(self, value: torch.Tensor) -> None:
            if not self._prompt:
                self.said.append(int(value.item()))
                self.moments.append(now())
            self._prompt = False

        def end(self) -> None:
            """Does nothing; transformers calls it at the end."""

    def answer(prompt: Ids, tokens: int) -> tuple[list[Moment], Ids]:
        clock, ids = Clock(), torch.tensor([prompt])
        with torch.inference_mode():
            network.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                do_sample=False,
                use_cache=True,
                streamer=clock,
            )
        return clock.moments, clock.said

    return answer


def now() -> Moment:
    """Returns the wall clock and the CPU time."""
    return time.perf_counter(), time.process_time()


def peak_memory() -> int:
    """Returns the peak resident set size in bytes."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def main() -> None:
    """Answers every prompt, after one to warm up.

    `best` has for each prompt the seconds to the first token and after it, by the wall clock, then in CPU time.
    """
    kind, directory, prompts, threads, *dtype = sys.argv[1:]
    wanted = json.loads(Path(prompts).read_text(encoding="utf-8"))
    began = time.perf_counter()
    if kind == "onnx":
        answer = onnx(Path(directory), int(threads))
    else:
        answer = transformers(Path(directory), int(threads), *(dtype or ["float32"]))
    loaded = time.perf_counter() - began
    answer(wanted["prompts"][0], wanted["tokens"])
    answers, best = [], []
    for prompt in wanted["prompts"]:
        times = []
        for _ in range(REPEATS):
            asked = now()
            moments, said = answer(prompt, wanted["tokens"])
            spans = ((asked, moments[0]), (moments[0], moments[-1]))
            times.append([end[clock] - begin[clock] for clock in (0, 1) for begin, end in spans])
        answers.append(said)
        best.append([min(column) for column in zip(*times, strict=True)])
    result = {"load": loaded, "peak": peak_memory(), "best": best, "answers": answers}
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main()
