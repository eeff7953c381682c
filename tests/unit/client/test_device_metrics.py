"""A device's figures for Prometheus are in a file, follow its status, and never stop it."""

from __future__ import annotations

from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from fedtune.client.live.device_metrics import metrics_file
from fedtune.client.live.device_status import DeviceReport
from fedtune.core.errors import InputError
from fedtune.core.host.clock import SYSTEM_CLOCK


def figures(path: Path) -> dict[str, float]:
    families = text_string_to_metric_families(path.read_text())
    return {sample.name: sample.value for family in families for sample in family.samples}


def report_of(tmp_path: Path, path: Path) -> DeviceReport:
    return DeviceReport(tmp_path, "ada", "localhost:1", lambda line: None, SYSTEM_CLOCK, also=[metrics_file(path)])


def test_the_file_follows_the_status_and_names_nobody(tmp_path: Path) -> None:
    path = tmp_path / "fedtune.prom"
    report = report_of(tmp_path, path)
    report.happens("connects", contact=12.0)
    assert figures(path)["fedtune_device_connected"] == 1
    report.happens("takes", task="train round 3")
    assert figures(path)["fedtune_device_working"] == 1
    report.tell(plan={"took": {"rounds": 3, "seconds": 4.5, "peak_bytes": None}})
    report.happens("answers")
    report.happens("ends", answered=7)
    found = figures(path)
    assert (found["fedtune_device_answers_total"], found["fedtune_device_working"]) == (7, 0)
    assert (found["fedtune_device_rounds_trained"], found["fedtune_device_round_seconds"]) == (3, 4.5)
    assert found["fedtune_device_contact_timestamp_seconds"] == 12
    assert not {"fedtune_device_peak_bytes", "fedtune_device_problem_timestamp_seconds"} & found.keys()
    report.happens("fails", trying=2, problem="ada's network is down", problem_time=20.0)
    found = figures(path)
    assert (found["fedtune_device_connected"], found["fedtune_device_failed_tries"]) == (0, 2)
    assert "ada" not in path.read_text()
    assert path.stat().st_mode & 0o044 == 0o044  # node_exporter is another user


def test_a_name_that_node_exporter_does_not_read_and_a_folder_that_is_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected a name that ends in \.prom"):
        metrics_file(tmp_path / "metrics.txt")
    with pytest.raises(InputError, match="No such file or directory"):
        metrics_file(tmp_path / "missing" / "fedtune.prom")


def test_a_file_that_cannot_be_written_does_not_stop_the_device(tmp_path: Path) -> None:
    folder = tmp_path / "exporter"
    folder.mkdir()
    report = report_of(tmp_path, folder / "fedtune.prom")
    (folder / "fedtune.prom").unlink()
    folder.rmdir()
    report.happens("connects")
    assert report.status.state == "connected"
