"""Metrics for Prometheus: what they count, who gets them, what they cost; and the dashboard and rules that use them."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml  # type: ignore[import-untyped]
from owner import make_server
from prometheus_client.parser import text_string_to_metric_families

from fedtune.core.errors import InputError
from fedtune.core.ledger import Ledger
from fedtune.core.round_records import ClientRecord, Evaluation, RoundRecord
from fedtune.server.live.fleet_metrics import FleetMetrics
from fedtune.server.live.job_queue import Jobs
from fedtune.server.live.server_home import ServerConfig, ServerHome
from fedtune.server.live.status_board import Board, JobStatus
from fedtune.server.run_display import Silent
from fedtune.server.watch.run_metrics import RunMetrics, metrics_route
from fedtune.server.watch.watch_server import WatchServer, parse_address

MONITORING = Path(__file__).parents[3] / "deploy" / "monitoring"
SCORE = Evaluation(loss=0.5, exact_match=0.75, examples=4, tokens=9)


@pytest.fixture
def home(tmp_path: Path) -> ServerHome:
    return make_server(tmp_path / "cloud", ServerConfig("localhost:8443", "127.0.0.1", 0))


def a_round(number: int, clients: int = 3, aborted: str | None = None) -> RoundRecord:
    """Returns a round whose last client dropped out."""
    records = [ClientRecord(f"client-{each}") for each in range(clients - 1)]
    records.append(ClientRecord("last", dropped="gone"))
    return RoundRecord(number, 12.5, "R", 0.1, tuple(records), 1.5, aborted, eval=SCORE)


def values(text: bytes) -> dict[str, float]:
    """Returns the value of each series: name{label=value} -> value."""
    found = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def test_a_runs_events_become_metrics_and_what_is_unknown_is_left_out() -> None:
    metrics = RunMetrics()
    assert "fedtune_train_loss" not in values(metrics.text())
    metrics.begin(4, 6, 3, 0)
    metrics.client(ClientRecord("client-0"))
    now = values(metrics.text())
    assert (now["fedtune_job_round"], now["fedtune_job_rounds"], now["fedtune_round_clients_in"]) == (5, 6, 1)
    assert now["fedtune_rounds_total{outcome=done}"] == 0
    metrics.round(a_round(5))
    metrics.round(a_round(6, aborted="too few"))
    now = values(metrics.text())
    assert now["fedtune_job_round"] == 6, "not a seventh of six"
    assert (now["fedtune_rounds_total{outcome=done}"], now["fedtune_rounds_total{outcome=aborted}"]) == (1, 1)
    assert [now[f"fedtune_clients_total{{outcome={each}}}"] for each in ("asked", "answered", "dropped")] == [6, 4, 2]
    assert (now["fedtune_last_round_asked"], now["fedtune_last_round_answered"]) == (3, 2)
    assert (now["fedtune_round_seconds_count"], now["fedtune_round_seconds_sum"]) == (2, 25.0)
    assert (now["fedtune_train_loss"], now["fedtune_eval_loss"], now["fedtune_exact_match"]) == (1.5, 0.5, 0.75)
    metrics.begin(0, 3, 3, 0)
    assert "fedtune_train_loss" not in values(metrics.text()), "the loss of another job"


def test_bytes_are_counted_by_direction() -> None:
    metrics = RunMetrics()
    traffic = Ledger().received("update", 7)
    metrics.round(RoundRecord(1, 1.0, "R", 0.1, (ClientRecord("ann", traffic=traffic),), 1.5))
    now = values(metrics.text())
    assert (now["fedtune_bytes_total{direction=up}"], now["fedtune_bytes_total{direction=down}"]) == (7, 0)


def test_a_server_shows_jobs_devices_and_its_certificate(home: ServerHome, tmp_path: Path) -> None:
    metrics, board = RunMetrics(), Board(tmp_path / "status.json", "localhost:8443", Silent())
    board.device("ann", state="online", heard=time.time() - 40, rounds=3)
    board.device("new")
    board.job = JobStatus("lamp", "training")
    metrics.registry.register(FleetMetrics(home, Jobs(home), board))
    now = values(metrics.text())
    assert now["fedtune_devices_enrolled"] == 2
    assert (now["fedtune_devices{state=online}"], now["fedtune_devices{state=never seen}"]) == (1, 1)
    assert 40 <= now["fedtune_device_last_contact_seconds{device=ann}"] < 60
    assert "fedtune_device_last_contact_seconds{device=new}" not in now
    assert now["fedtune_device_rounds{device=ann}"] == 3
    assert now["fedtune_jobs{state=finished}"] == 0
    assert now["fedtune_job_info{name=lamp}"] == 1
    assert now["fedtune_certificate_days_left"] > 300


def test_metrics_cost_a_round_next_to_nothing_and_a_thousand_devices_are_read_at_once(
    home: ServerHome, tmp_path: Path
) -> None:
    metrics, board = RunMetrics(), Board(tmp_path / "status.json", "localhost:8443", Silent())
    record = a_round(1, clients=100)
    began = time.process_time()
    for client in record.clients:
        metrics.client(client)
    metrics.round(record)
    assert time.process_time() - began < 0.02  # under 1% of a round of two seconds
    for number in range(1000):
        board.device(f"device-{number}", state="online", heard=0.0)
    metrics.registry.register(FleetMetrics(home, Jobs(home), board))
    began = time.process_time()
    metrics.text()
    assert time.process_time() - began < 1.0


@pytest.fixture
def url() -> Iterator[str]:
    with WatchServer([metrics_route(RunMetrics())], "0") as url:
        yield url


def test_metrics_are_served_on_this_machine(url: str) -> None:
    answer = httpx.get(f"{url}/metrics")
    assert url.startswith("http://127.0.0.1:")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert "fedtune_rounds_total" in answer.text
    assert httpx.get(f"{url}/other").status_code == 404
    assert httpx.post(f"{url}/metrics").status_code == 405


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:80", "[::1]:9", "10.0.0.7:9464"])
def test_it_may_be_asked_by_any_address_and_as_localhost(url: str, host: str) -> None:
    assert httpx.get(f"{url}/metrics", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example"},
        {"host": "127.0.0.1.evil.example"},
        {"host": "localhost.evil.example:9464"},
        {"host": "[::1"},
        {"host": ""},
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://localhost:3000"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
)
def test_a_page_of_another_site_and_a_name_bent_to_this_machine_get_nothing(url: str, headers: dict[str, str]) -> None:
    answer = httpx.get(f"{url}/metrics", headers=headers)
    assert answer.status_code in (400, 403)
    assert "fedtune_" not in answer.text
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("9464", ("127.0.0.1", 9464)),
        ("0.0.0.0:80", ("0.0.0.0", 80)),
        ("[::1]:80", ("::1", 80)),
        (":80", ("127.0.0.1", 80)),
    ],
)
def test_an_address_has_a_port_and_is_this_machines_unless_told(text: str, address: tuple[str, int]) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize("text", ["", "metrics", "localhost", "1:99999", "a b:80", "1:-1"])
def test_another_text_is_no_address_and_the_error_shows_one(text: str) -> None:
    with pytest.raises(InputError, match=r"expected PORT or HOST:PORT, for example 9464"):
        parse_address(text)


def test_a_port_that_is_taken_is_said(url: str) -> None:
    with pytest.raises(InputError, match="Address already in use; choose another port"):  # noqa: SIM117
        with WatchServer([metrics_route(RunMetrics())], url.removeprefix("http://")):
            pass


# -- deploy/monitoring ------------------------------------------------------------------------------------------------


@pytest.fixture
def families(home: ServerHome, tmp_path: Path) -> set[str]:
    """Gives the names of all series that a server with a job can have."""
    metrics, board = RunMetrics(), Board(tmp_path / "status.json", "localhost:8443", Silent())
    board.device("ann", state="online", heard=0.0)
    board.job = JobStatus("lamp", "training")
    metrics.registry.register(FleetMetrics(home, Jobs(home), board))
    metrics.begin(0, 3, 3, 0)
    metrics.round(a_round(1))
    return {series.partition("{")[0] for series in values(metrics.text())}


def used(expressions: list[str]) -> set[str]:
    return {name for text in expressions for name in re.findall(r"\bfedtune_\w+", text)}


def test_the_dashboard_uses_metrics_that_exist_and_its_panels_do_not_overlap(families: set[str]) -> None:
    board = json.loads((MONITORING / "dashboard.json").read_text())
    panels = board["panels"]
    expressions = [target["expr"] for panel in panels for target in panel["targets"]]
    queries = [variable["query"] for variable in board["templating"]["list"]]
    assert used([*expressions, *queries]) <= families
    assert all('instance=~"$instance"' in text for text in expressions)
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells


def test_the_alert_rules_use_metrics_that_exist_and_each_says_what_to_do(families: set[str]) -> None:
    (group,) = yaml.safe_load((MONITORING / "alerts.yaml").read_text())["groups"]
    assert used([rule["expr"] for rule in group["rules"]]) <= families
    for rule in group["rules"]:
        assert rule["alert"].startswith("Fedtune")
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"]["summary"]
        assert rule["annotations"]["description"]
