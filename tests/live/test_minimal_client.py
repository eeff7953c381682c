"""A program that knows the wire protocol's page and nothing of fedtune is a device like any other."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from live_helpers import MakeFleet, eventually
from owner import approve

from fedtune.server.live.enrolled_devices import waiting

PROGRAM = Path(__file__).parent / "minimal_client.py"


def test_it_joins_registers_and_trains_beside_devices_of_ours(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(2)
    fleet.join(allow_clear=True)
    fleet.start_server()
    command = [sys.executable, "-I", str(PROGRAM), str(fleet.home.path / "invitation.json"), "other", "2"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with (fleet.folder / "other.log").open("w") as log:
        other = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    try:
        eventually(lambda: waiting(fleet.home), complaint=fleet.logs)
        (request,) = waiting(fleet.home)
        assert request.code in (fleet.folder / "other.log").read_text()
        approve(fleet.home, request)
        fleet.start_devices()
        overrides = ["secure_aggregation.enabled=false", "compression.preset=none", "federation.rounds=2"]
        rounds = fleet.finished(fleet.submit(*overrides))
        assert [line["survivors"] for line in rounds] == [[*fleet.names, "other"]] * 2
        assert other.wait(30) == 0, fleet.logs()
        assert "registered for job" in (fleet.folder / "other.log").read_text()
    finally:
        other.kill()
        other.wait()
