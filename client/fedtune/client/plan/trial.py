"""The trial step: one real training step under a plan, in a process of its own, to check the plan's predictions.

    measured = measure("fedtune.client.torch.trial_step", case)      # starts a new process with that module
    answer(run_case)                                                 # the module's part, in that process

The peak is taken over the memory that the process has once every library is loaded. If memory runs out, that process
dies and not the caller's.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from fedtune.client.plan.backend import Case, Measured, Meter, case_from_json
from fedtune.client.trainer import LocalResult, LocalTask
from fedtune.core.adapter.layout import AdapterLayout, Vector
from fedtune.core.errors import ModelError, RunError
from fedtune.core.job.local_work import TrainingSettings, local_work
from fedtune.data.examples import Example

STEPS = 5  # until glibc's heap has settled
_STEPS_OF_OTHERS = 2  # with other numbers of threads, of which the shorter counts
_SECONDS_BEFORE_OTHERS = 120  # after which no other number is tried: memory, which matters more, is known by then
_SECONDS_ALLOWED = 900
_FIRST_TO_KILL = "1000"
_REFUSED = "refused"  # key of an answer that is the reason why the model cannot be used


@dataclass(frozen=True)
class Loaded:
    """A base model in memory, as a trial uses it.

    Args:
        vocabulary: number of tokens that examples may have.
        train: trains the received adapter on examples, without a retry where memory runs out.
    """

    layout: AdapterLayout
    vocabulary: int
    train: Callable[[Sequence[Example], Vector, LocalTask], LocalResult]


def measure(module: str, case: Case) -> Measured:
    """Runs the case in a new process.

    Args:
        module: the module to run, which calls `answer`.

    Raises:
        RunError: the process died, as it does when memory runs out, or took too long.
    """
    command = [sys.executable, "-m", module]
    try:
        done = subprocess.run(
            command,
            input=json.dumps(asdict(case)),
            capture_output=True,
            text=True,
            timeout=_SECONDS_ALLOWED,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise RunError(f"one training step took more than {_SECONDS_ALLOWED} s on this device") from error
    if done.returncode < 0:
        raise RunError(f"the calibration step was killed by signal {-done.returncode}, as a process out of memory is")
    try:
        answered = json.loads(done.stdout.splitlines()[-1])
        if isinstance(answered, dict) and _REFUSED in answered:
            raise ModelError(answered[_REFUSED])
        return Measured(**answered)
    except (IndexError, ValueError, TypeError) as error:
        last = (done.stderr.strip() or "it printed nothing").splitlines()[-1]
        raise RunError(f"the calibration step failed: {last}") from error


def answer(run_case: Callable[[Case], Measured]) -> None:
    """Reads a case from standard input, and prints what `run_case` measures."""
    with suppress(OSError):  # makes the kernel kill this process first where memory runs out, not its caller
        Path("/proc/self/oom_score_adj").write_text(_FIRST_TO_KILL)
    try:
        answered = asdict(run_case(case_from_json(json.load(sys.stdin))))
    except ModelError as error:
        answered = {_REFUSED: str(error)}
    print(json.dumps(answered))


def measured_steps(
    case: Case, meter: Meter, load: Callable[[], Loaded], set_threads: Callable[[int], None] | None = None
) -> Measured:
    """Measures in this process, which must have done nothing but load its libraries.

    Args:
        set_threads: sets the library's number of threads, where that can be done with a loaded model.
    """
    start = time.perf_counter()
    runtime = meter.reset()
    loaded = load()
    loading = meter.peak()
    resident = meter.reset()
    seconds = {case.choices.threads: min([take_step(loaded, case) for _ in range(STEPS)][1:])}
    peak = meter.peak()

    def took(threads: int) -> float:
        assert set_threads is not None
        if threads not in seconds:
            if time.perf_counter() - start > _SECONDS_BEFORE_OTHERS:
                return math.inf
            set_threads(threads)
            seconds[threads] = min(take_step(loaded, case) for _ in range(_STEPS_OF_OTHERS))
        return seconds[threads]

    if set_threads:
        try_threads(took, case.cores)
    threads = min(seconds, key=lambda each: (seconds[each], each))
    return Measured(
        runtime=runtime,
        loading=loading - runtime,
        resident=resident - runtime,
        training=peak - runtime,
        step_seconds=seconds[threads],
        tokens=case.choices.tokens,
        threads=threads,
    )


def try_threads(seconds: Callable[[int], float], most: int) -> None:
    """Tries `most` threads and its halves, down to the first that is slower.

    Args:
        seconds: number of threads -> the seconds of a step.
    """
    threads = max(1, most)
    while seconds(threads) < math.inf and threads > 1 and seconds(threads // 2) <= seconds(threads):
        threads //= 2


def take_step(loaded: Loaded, case: Case) -> float:
    """Takes one optimizer step on random tokens of the full length; returns its seconds."""
    choices, random = case.choices, np.random.default_rng(0)
    first = max(1, round(choices.sequence_length * (1.0 - case.target_share)))
    examples = [
        Example(random.integers(0, loaded.vocabulary, choices.sequence_length).astype(np.int32), first)
        for _ in range(case.micro_batch)
    ]
    settings = TrainingSettings(
        local_steps=1,
        learning_rate=1e-5,
        batch_tokens=choices.tokens,
        gradient_checkpointing=choices.checkpointing,
    )
    task = LocalTask(0, local_work(settings, loaded.layout.factors))
    start = time.perf_counter()
    loaded.train(examples, loaded.layout.initial(0), task)
    return time.perf_counter() - start
