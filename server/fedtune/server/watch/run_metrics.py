"""The figures of a run for Prometheus: rounds, clients, bytes, losses and scores, taken from a run's events.

    metrics = RunMetrics()
    run_rounds(..., display=Several(display, metrics), ...)
    metrics.text()                   # in Prometheus' text format

An event costs microseconds. Figures that are not known, such as the loss before the first round, are left out.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.responses import Response
from starlette.routing import Route

from fedtune.core.round_records import ClientRecord, RoundRecord

TEXT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 14_400)

_GAUGES = {
    "fedtune_job_round": "The round in progress.",
    "fedtune_job_rounds": "The rounds of the job in progress.",
    "fedtune_round_cohort": "Clients that a round of the job asks, about.",
    "fedtune_round_clients_in": "Clients of the round in progress that have answered or dropped out.",
    "fedtune_last_round_seconds": "Duration of the last round.",
    "fedtune_last_round_asked": "Clients that the last round asked.",
    "fedtune_last_round_answered": "Clients whose update the last round counted.",
    "fedtune_train_loss": "Training loss of the last round that has one.",
    "fedtune_eval_loss": "Loss on held-out examples, at the last evaluation.",
    "fedtune_exact_match": "Share of held-out requests answered exactly, at the last evaluation.",
}


def metrics_route(metrics: RunMetrics) -> Route:
    """Returns /metrics."""
    return Route("/metrics", lambda _: Response(metrics.text(), media_type=TEXT_TYPE), methods=["GET"])


class RunMetrics(Collector):
    """A display whose events become metrics, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._lock = threading.Lock()
        self._known: dict[str, float] = {}
        self._seconds = Histogram(
            "fedtune_round_seconds", "Duration of rounds.", buckets=_SECONDS, registry=self.registry
        )
        self._rounds = Counter(
            "fedtune_rounds", "Rounds that ended: done or aborted.", ["outcome"], registry=self.registry
        )
        self._clients = Counter(
            "fedtune_clients", "Clients in rounds: asked, answered, dropped.", ["outcome"], registry=self.registry
        )
        self._bytes = Counter(
            "fedtune_bytes", "Payload bytes: up to the server, down to clients.", ["direction"], registry=self.registry
        )
        for outcome in ("done", "aborted"):  # from the start, so that an increase from nothing is seen
            self._rounds.labels(outcome)
        for outcome in ("asked", "answered", "dropped"):
            self._clients.labels(outcome)
        for direction in ("up", "down"):
            self._bytes.labels(direction)
        self.registry.register(self)

    def text(self) -> bytes:
        """Returns all metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    def describe(self) -> Iterator[Metric]:
        """Yields the families of `collect`, without values."""
        for name, text in _GAUGES.items():
            yield GaugeMetricFamily(name, text)

    def collect(self) -> Iterator[Metric]:
        """Yields the figures that are known now."""
        with self._lock:
            known = dict(self._known)
        for name, value in known.items():
            yield GaugeMetricFamily(name, _GAUGES[name], value)

    # -- as a Display -------------------------------------------------------------------------------------------------

    def note(self, text: str) -> None:
        """Ignores the sentence."""

    def progress(self, task: str, done: int, count: int) -> None:
        """Ignores work beside the rounds."""

    def begin(self, done: int, rounds: int, cohort: int, moved: int) -> None:
        """Begins a job's first round in this process; the figures of the job before go."""
        del moved
        with self._lock:
            self._known = {
                "fedtune_job_round": min(done + 1, rounds),
                "fedtune_job_rounds": rounds,
                "fedtune_round_cohort": cohort,
                "fedtune_round_clients_in": 0,
            }

    def client(self, record: ClientRecord) -> None:
        """Counts a client that is in."""
        del record
        with self._lock:
            self._known["fedtune_round_clients_in"] = self._known.get("fedtune_round_clients_in", 0) + 1

    def round(self, record: RoundRecord) -> None:
        """Counts a round."""
        asked, answered, traffic = len(record.clients), len(record.survivors), record.traffic
        self._seconds.observe(record.seconds)
        self._rounds.labels("aborted" if record.aborted else "done").inc()
        for outcome, count in (("asked", asked), ("answered", answered), ("dropped", asked - answered)):
            self._clients.labels(outcome).inc(count)
        self._bytes.labels("up").inc(traffic.bytes_up)
        self._bytes.labels("down").inc(traffic.bytes_down)
        score = record.eval
        figures = {
            "fedtune_job_round": record.round + 1,
            "fedtune_round_clients_in": 0,
            "fedtune_last_round_seconds": record.seconds,
            "fedtune_last_round_asked": asked,
            "fedtune_last_round_answered": answered,
            "fedtune_train_loss": record.train_loss,
            "fedtune_eval_loss": score.loss if score else None,
            "fedtune_exact_match": score.exact_match if score else None,
        }
        with self._lock:
            self._known |= {name: float(value) for name, value in figures.items() if value is not None}
            rounds = self._known.get("fedtune_job_rounds", record.round)
            self._known["fedtune_job_round"] = min(self._known["fedtune_job_round"], rounds)

    def end(self, summary: dict[str, Any]) -> None:
        """Keeps the last figures until the next job begins."""
