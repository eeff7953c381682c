"""Prometheus metrics of one server, in a registry of its own."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from fedtune.client.inference.scheduler import Scheduler

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_WHOLE = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """What a server counts."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "fedtune_requests", "Requests answered.", ["endpoint", "status"], registry=self._registry
        )
        self.prompt_tokens = Counter("fedtune_prompt_tokens", "Tokens of prompts.", registry=self._registry)
        self.completion_tokens = Counter("fedtune_completion_tokens", "Tokens of answers.", registry=self._registry)
        self.finished = Counter("fedtune_streams", "Streams that ended.", ["reason"], registry=self._registry)
        self.first_token = Histogram(
            "fedtune_first_token_seconds", "Request to first text.", buckets=_FIRST_TOKEN, registry=self._registry
        )
        self.seconds = Histogram(
            "fedtune_stream_seconds", "Request to last token.", buckets=_WHOLE, registry=self._registry
        )
        active = Gauge("fedtune_active_streams", "Streams that get tokens.", registry=self._registry)
        active.set_function(lambda: scheduler.load[0])
        waiting = Gauge("fedtune_waiting_streams", "Streams that wait for a slot.", registry=self._registry)
        waiting.set_function(lambda: scheduler.load[1])

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)
