"""The load program with sixteen clients finds no error, bounded memory, fair shares, and slots that become free."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from export_helpers import export_run

PROGRAM = Path(__file__).parents[3] / "benchmarks" / "inference" / "streams.py"
GROWTH_MB = 50.0


def load(make_run: Callable[..., Path], folder: Path, seconds: int) -> dict[str, Any]:
    model = export_run(make_run(), ["fp32"], folder)[0].path
    command = [sys.executable, str(PROGRAM), str(model), "--seconds", str(seconds), "--json"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=seconds + 120, check=False, env=os.environ.copy()
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def check(found: dict[str, Any], share: float) -> None:
    assert found["errors"] == []
    assert found["streams"] == 16
    assert found["requests"] >= 16
    assert found["tokens_least"] >= share * found["tokens_most"]
    assert found["memory_mb_largest"] - found["memory_mb_settled"] < GROWTH_MB
    assert found["slot_freed_seconds"] < 1.0


def test_sixteen_clients_get_their_answers_in_fair_shares(make_run: Callable[..., Path], tmp_path: Path) -> None:
    check(load(make_run, tmp_path, 5), 0.5)


@pytest.mark.slow
def test_sixteen_clients_get_their_answers_for_a_minute(make_run: Callable[..., Path], tmp_path: Path) -> None:
    check(load(make_run, tmp_path, 60), 0.8)
