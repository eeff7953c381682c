"""Reads trace files as strictly as a viewer could."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

ROUNDING = 1e-3  # microseconds; times are whole nanoseconds


def read_trace(path: Path) -> list[dict[str, Any]]:
    """Returns the spans of a trace file in Chrome's format, each with the name of its thread as "thread".

    Asserts that every event is whole, that every thread has a name, and that spans of a thread nest.
    """
    trace = json.loads(path.read_text(encoding="utf-8"))
    assert set(trace) == {"displayTimeUnit", "otherData", "traceEvents"}
    threads: dict[tuple[int, int], str] = {}
    processes: dict[int, str] = {}
    spans: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
    for event in trace["traceEvents"]:
        assert {"name", "ph", "ts", "pid", "tid"} <= event.keys()
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        assert event["name"]
        if event["ph"] == "M":
            place = event["pid"], event["tid"]
            if event["name"] == "process_name":
                assert event["pid"] not in processes
                processes[event["pid"]] = event["args"]["name"]
            else:
                assert event["name"] == "thread_name"
                assert place not in threads
                threads[place] = event["args"]["name"]
        else:
            assert event["ph"] == "X"
            assert event["ts"] >= 0
            assert event["dur"] >= 0
            spans[event["pid"], event["tid"]].append(event)
    assert threads.keys() >= spans.keys()
    assert processes.keys() == {process for process, _ in threads}
    for each in spans.values():
        assert_nested(each)
    return [{**span, "thread": threads[place]} for place, each in spans.items() for span in each]


def assert_nested(spans: list[dict[str, Any]]) -> None:
    """Asserts that spans of a thread, sorted by their begin, are within the one before or begin after it."""
    ends: list[float] = []
    assert spans == sorted(spans, key=lambda span: (span["ts"], -span["dur"]))
    for span in spans:
        while ends and ends[-1] <= span["ts"] + ROUNDING:
            ends.pop()
        end = span["ts"] + span["dur"]
        assert not ends or end <= ends[-1] + ROUNDING, span
        ends.append(end)
