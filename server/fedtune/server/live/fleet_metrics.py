"""The figures of a server for Prometheus beside those of its run: jobs by state, devices, and its certificate.

They are read when Prometheus asks, so they cost the server nothing between.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from typing import get_args

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from fedtune.server.live.job_queue import STATES, WAITING, Jobs
from fedtune.server.live.server_home import ServerHome
from fedtune.server.live.status_board import Board, DeviceState

_RUNNING = "running"


class FleetMetrics(Collector):
    """Reads a server's board and queue."""

    def __init__(self, home: ServerHome, jobs: Jobs, board: Board) -> None:
        self._home, self._jobs, self._board = home, jobs, board

    def describe(self) -> Iterator[Metric]:
        """Yields no families, since their names are in `collect` alone."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """Yields the figures of now."""
        job, devices = self._board.job, self._board.snapshot()
        states = Counter(state for state, _ in self._jobs.all())
        if job is not None and states[WAITING]:
            states[WAITING] -= 1
            states[_RUNNING] = 1
        family = GaugeMetricFamily("fedtune_jobs", "Jobs by state.", labels=["state"])
        for state in (_RUNNING, *STATES):
            family.add_metric([state], states[state])
        yield family
        if job is not None:
            family = GaugeMetricFamily("fedtune_job_info", "The job in progress.", labels=["name"])
            family.add_metric([job.name], 1)
            yield family
        yield GaugeMetricFamily("fedtune_devices_enrolled", "Devices of the fleet.", len(devices))
        counts = Counter(device.state for device in devices.values())
        family = GaugeMetricFamily("fedtune_devices", "Devices by state.", labels=["state"])
        for name in get_args(DeviceState):
            family.add_metric([name], counts[name])
        yield family
        ages = GaugeMetricFamily(
            "fedtune_device_last_contact_seconds", "Seconds since a device's last heartbeat.", labels=["device"]
        )
        rounds = GaugeMetricFamily("fedtune_device_rounds", "Rounds that a device contributed to.", labels=["device"])
        for name, device in devices.items():
            rounds.add_metric([name], device.rounds)
            if device.heard is not None:
                ages.add_metric([name], max(0.0, time.time() - device.heard))
        yield ages
        yield rounds
        days = self._home.certificate_days_left()
        yield GaugeMetricFamily("fedtune_certificate_days_left", "Days until the certificate expires.", days)
