"""Checkpoints have the whole state between rounds, with the server's own vectors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fedtune.core.adapter.layout import Vector
from fedtune.core.errors import JobError
from fedtune.core.job.job_file import load_job, recorded_job
from fedtune.core.protocol.messages import Rebasing
from fedtune.server.run_directory import Checkpoint, RunDirectory
from fedtune.strategies.aggregation.evidence import NO_EVIDENCE, GroupTest
from fedtune.strategies.cohorts.suspicion import Circle, Suspicion
from fedtune.strategies.federation import FederationState


def test_a_run_whose_job_this_release_would_not_begin_says_so_and_can_still_be_read(tmp_path: Path) -> None:
    directory = RunDirectory.create(tmp_path / "run", load_job(None), "0" * 64)
    file = tmp_path / "run" / "job.toml"
    file.write_text(file.read_text().replace('weight = "uniform"', 'weight = "examples"'))
    with pytest.raises(JobError, match=r'weight is "examples".* begun by a release that permitted it'):
        directory.job()
    directory.close()
    assert recorded_job(file).federation.weight == "examples"


def test_what_the_server_keeps_comes_back_bit_for_bit_and_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    adapter = np.arange(6, dtype=np.float32)
    server: dict[str, Vector] = {"optimizer.m.b": (adapter / 7).astype(np.float32), "flora.residual": adapter * 3}
    directory = RunDirectory.create(tmp_path / "run", load_job(None), "0" * 64)
    state = FederationState(1, adapter, adapter + 1, {"a": 1.0}, server)
    directory.acknowledge(Checkpoint(state, "0" * 64, "1" * 64, 1.0, None), None)
    rebasing, stale_updates = Rebasing(1, "a" * 64, 0), {"ann/../ö": b"late \x00\xff", "bob": b""}
    suspicion = Suspicion((Circle(frozenset({"ann", "bob"}), frozenset({"eve"})),), ("mallory",))
    evidence = NO_EVIDENCE.after(GroupTest((("ann", "bob"), ("eve",)), (0.1, -0.1)), 0.2)
    second = FederationState(2, adapter, adapter, {}, server, stale_updates, rebasing, suspicion, evidence)
    directory.acknowledge(Checkpoint(second, "0" * 64, "1" * 64, 2.0, None), None)
    restored = directory.restore()
    assert restored is not None
    assert restored.state.round == 2
    assert (restored.state.stale_updates, restored.state.rebasing) == (stale_updates, rebasing)
    assert (restored.state.suspicion, restored.state.evidence) == (suspicion, evidence)
    assert {name: value.tobytes() for name, value in restored.state.server.items()} == {
        name: value.tobytes() for name, value in server.items()
    }
    path = tmp_path / "run" / "checkpoints" / "000002" / "state.safetensors"
    tensors = load_file(path)
    tensors["server.flora.residual"][0] = 99.0
    save_file(tensors, path)
    restored = directory.restore()
    directory.close()
    assert restored is not None
    assert restored.state.round == 1
