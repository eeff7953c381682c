"""The example that a newcomer runs: live processes on loopback, and the same adapter as in simulation."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "examples" / "live-loopback" / "run.sh"


def test_the_live_example_gives_the_adapter_that_its_simulation_gives(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "FEDTUNE_PORT": str(port),
    }
    done = subprocess.run(
        ["bash", SCRIPT, tmp_path / "example"],
        capture_output=True,
        text=True,
        timeout=290,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the same, bit for bit" in done.stdout
