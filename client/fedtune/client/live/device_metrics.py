"""A device's figures for Prometheus in a file, which node_exporter's textfile collector reads: a device opens no port.

    report = DeviceReport(..., also=[metrics_file(Path("/var/lib/node_exporter/fedtune.prom"))])

The file is replaced whole whenever the status changes, and readable for everybody: it has counts and times, no names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from prometheus_client import CollectorRegistry, write_to_textfile
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from fedtune.client.live.device_status import Status
from fedtune.core.errors import InputError

SUFFIX = ".prom"  # node_exporter reads no other files
_CONNECTED = ("connected", "working", "answering")


class _Figures(Collector):
    def __init__(self, status: Status) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        """Yields the figures that are known."""
        status = self._status
        took = (status.plan or {}).get("took", {})
        yield GaugeMetricFamily(
            "fedtune_device_connected", "1 while the server counts the device in.", float(status.state in _CONNECTED)
        )
        yield GaugeMetricFamily(
            "fedtune_device_working", "1 while it works for a round.", float(status.state == "working")
        )
        yield GaugeMetricFamily(
            "fedtune_device_sits_out", "1 while a condition of its owner keeps it from training.", bool(status.sits_out)
        )
        yield CounterMetricFamily(
            "fedtune_device_answers", "Messages answered since the process began.", status.answered
        )
        yield GaugeMetricFamily(
            "fedtune_device_failed_tries", "Tries in a row that did not reach the server.", status.trying
        )
        for name, text, value in (
            ("contact_timestamp_seconds", "The server's last answer.", status.contact),
            ("problem_timestamp_seconds", "The last problem; the status has its text.", status.problem_time),
            ("rounds_trained", "Rounds trained under the plan in force.", took.get("rounds")),
            ("round_seconds", "Seconds of training in the last round.", took.get("seconds")),
            ("peak_bytes", "Most memory that training took, beside the program itself.", took.get("peak_bytes")),
        ):
            if value is not None:
                yield GaugeMetricFamily(f"fedtune_device_{name}", text, value)


def metrics_file(path: Path) -> Callable[[Status], None]:
    """Returns a function that writes a status to the file; a full disk does not stop the device.

    Raises:
        InputError: the file's name is not one that node_exporter reads, or it cannot be written.
    """
    if path.suffix != SUFFIX:
        raise InputError(f"--metrics {path}: expected a name that ends in {SUFFIX}; node_exporter reads no others")
    try:
        path.touch()
    except OSError as error:
        raise InputError(f"--metrics {path}: {error.strerror}") from None

    def write(status: Status) -> None:
        registry = CollectorRegistry()
        registry.register(_Figures(status))
        with suppress(OSError):
            write_to_textfile(str(path), registry)

    return write
