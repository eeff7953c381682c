"""What a device holds from one message to the next."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fedtune.client.device import Device
from fedtune.client.live.device_home import JobMemory
from fedtune.core.adapter.layout import AdaptedModule, AdapterLayout, adapter_digest
from fedtune.core.codec.downlink import FIRST
from fedtune.strategies.broadcast import Broadcast

LAYOUT = AdapterLayout((AdaptedModule("q", 4, 3),), rank=2, alpha=2.0)


def test_two_jobs_that_begin_with_the_same_adapter_both_remember_it(tmp_path: Path) -> None:
    memory, first = JobMemory(tmp_path), LAYOUT.initial(0)
    trainer: Any = SimpleNamespace(layout=LAYOUT, digest="0" * 64)
    device = Device(lambda base: trainer, lambda *asked: [], memory)
    adapter = Broadcast(LAYOUT, first, exact=False).write(FIRST, first)
    request: Any = SimpleNamespace(base=SimpleNamespace(digest="0" * 64), adapter=adapter, job_seed=0)
    for job in ("one", "two"):
        memory.begin(job, secure=True, terms=b"")
        assert device.hold(request) == adapter_digest(first)
        kept = memory.adapter(adapter_digest(first), LAYOUT.size)  # which the next round's change is against
        assert kept is not None, job
        assert kept.tobytes() == first.tobytes()
