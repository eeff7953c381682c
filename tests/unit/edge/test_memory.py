"""Training on an edge pack keeps to the memory of its control group, and weights larger than that are read again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

MakeModel = Callable[..., Path]
PackOf = Callable[[str], Path]
MB = 1_000_000

# A control group limits its own page cache too, so the files of a pack must not be in memory when it starts.
TRAINING = """
import json, os, sys
from pathlib import Path
pack = Path(sys.argv[1])
Path(sys.argv[2], "cgroup.procs").write_text(str(os.getpid()))
for path in pack.iterdir():
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
import numpy as np
from fedtune.client.onnx.onnx_trainer import open_trainer
from fedtune.client.trainer import Limits, LocalTask
from fedtune.core.job.local_work import TrainingSettings, local_work
from fedtune.core.job.settings import AdapterSettings
from fedtune.data.examples import Example

trainer = open_trainer(pack, AdapterSettings(kind="lora", rank=4))
trainer.limits = Limits(checkpointing=True)
work = local_work(TrainingSettings(learning_rate=1e-3, local_steps=2, batch_tokens=64), "ab")
examples = [Example(np.arange(3, 67, dtype=np.int32), 32)]
result = trainer.train(examples, trainer.layout.initial(0), LocalTask(0, work))
print(json.dumps([result.loss, float(np.abs(result.update).sum())]))
"""


class Group:
    """A control group of version 1 or 2, which limits memory."""

    def __init__(self, path: Path) -> None:
        self.path, self._old = path, (path / "memory.limit_in_bytes").exists()

    def limit(self, size: int) -> None:
        (self.path / ("memory.limit_in_bytes" if self._old else "memory.max")).write_text(str(size))

    def peak(self) -> int:
        return int((self.path / ("memory.max_usage_in_bytes" if self._old else "memory.peak")).read_text())


@pytest.fixture
def group() -> Iterator[Group]:
    """Gives an empty control group, or skips the test where none can be made."""
    root = Path("/sys/fs/cgroup")
    path = (root / "memory" if (root / "memory").is_dir() else root) / f"fedtune-test-{os.getpid()}"
    try:
        path.mkdir()
    except OSError as error:
        pytest.skip(f"control groups may not be made here: {error}")
    if not any((path / name).exists() for name in ("memory.limit_in_bytes", "memory.max")):
        path.rmdir()
        pytest.skip("control groups do not limit memory here")
    yield Group(path)
    path.rmdir()


def trained(pack: Path, group: Group) -> list[float]:
    command = [sys.executable, "-c", TRAINING, str(pack), str(group.path)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    found: list[float] = json.loads(done.stdout)
    return found


@pytest.mark.slow
def test_a_base_larger_than_the_memory_trains_to_the_same_bits(
    make_model: MakeModel, pack_of: PackOf, group: Group
) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 40, "head_dim": 128}
    pack = pack_of(str(make_model("llama", **sizes)))
    weights = (pack / "weights.safetensors").stat().st_size
    group.limit(1000 * MB)
    expected = trained(pack, group)
    most = group.peak()
    assert most > weights
    # A third of the weights must be read again in every pass. With half of them a busy machine, which reads libraries
    # again on the group's account, has ended the process.
    group.limit(most - weights // 3)
    assert trained(pack, group) == expected
