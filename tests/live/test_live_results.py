"""The results of a live run: the same adapter as in a simulation, an export, and sums over all devices."""

from __future__ import annotations

from pathlib import Path

import pytest
from live_helpers import SMALL, MakeFleet, eventually

from fedtune.core.job.job_file import load_job
from fedtune.core.protocol.model_manifest import verify
from fedtune.demo import JOB
from fedtune.server.run_directory import read_summary
from fedtune.server.run_display import Silent
from fedtune.server.simulation.simulate import simulate

pytestmark = pytest.mark.slow

LONG = 500.0


def test_a_live_run_gives_its_simulations_adapter_whatever_aggregates(make_fleet: MakeFleet, tmp_path: Path) -> None:
    """The adapters are equal bit for bit: a round sums integers, so the order of the answers does not matter."""
    fleet = make_fleet(3)
    fleet.join()
    fleet.start_server()
    fleet.start_devices()
    data = f"data.train={fleet.folder / 'data' / 'clients' / '*.jsonl'}"
    for name, settings in (
        ("alternating", ("federation.aggregation=alternating", "federation.rounds=4")),
        ("fedrot", ("federation.aggregation=fedrot", "federation.server_optimizer=momentum")),
    ):
        live = fleet.submit(*settings, "federation.clients_per_round=1.0", name=name)
        fleet.finished(live, LONG)
        job = load_job(JOB, [*SMALL, *settings, "federation.clients_per_round=1.0", data])
        simulated = simulate(job, tmp_path / name, Silent())
        assert read_summary(live)["adapter_digest"] == simulated["adapter_digest"], name
        assert read_summary(live)["bytes"]["up"] > 0


def test_a_live_job_ends_with_its_export_even_if_the_server_is_killed_in_the_middle_of_it(
    make_fleet: MakeFleet,
) -> None:
    fleet = make_fleet(3)
    fleet.join()
    run = fleet.submit('export.formats=["fp32"]')
    server = fleet.start_server()
    fleet.start_devices()
    eventually(lambda: (fleet.status()["job"] or {}).get("state") == "exporting", LONG, fleet.logs)
    eventually(lambda: list((run / "onnx").glob(".export-*")), LONG, fleet.logs)
    server.kill()
    for device in fleet.devices.values():  # the devices are no longer needed
        assert device.stop() == 0
    eventually(lambda: not fleet.leftovers(), 20, lambda: f"still running: {fleet.leftovers()}")
    rounds = (run / "rounds.jsonl").read_bytes()
    fleet.start_server()
    fleet.finished(run, LONG)
    summary = read_summary(run)
    (done,) = summary["exports"]
    assert verify(Path(done["path"])).provenance["adapter_digest"] == summary["adapter_digest"]
    assert (run / "rounds.jsonl").read_bytes() == rounds
    assert [path.name for path in (run / "onnx").iterdir() if path.is_dir()] == ["fp32"]


def test_secure_rounds_of_eight_devices_sum_all_eight(make_fleet: MakeFleet) -> None:
    """benchmarks/live measures how long they take."""
    fleet = make_fleet(8)
    fleet.join()
    run = fleet.submit("federation.rounds=4", "federation.clients_per_round=1.0", "data.holdout=0")
    fleet.start_server()
    fleet.start_devices()
    lines = fleet.finished(run, LONG)
    assert [line["secure"]["summed"] for line in lines] == [8] * 4
