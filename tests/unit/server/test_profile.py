"""A profile's table adds up, its trace is valid, and both are there however the run ends."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from traces import read_trace

from fedtune.core.spans import ROUND, WORKER, Place, Recorder, Span, span
from fedtune.server.run_directory import PROFILE, TRACE
from fedtune.server.run_display import Silent
from fedtune.server.run_profile import IDLE, OTHERWISE, REST, Profile, profiling

SECOND = 1_000_000_000


class Notes(Silent):
    """Keeps what is noted."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


def recorded(most: int = 100) -> Recorder:
    """Returns a recording of ten seconds: a round of six, two workers of eight, one of which works for five."""
    recorder = Recorder(most)

    def add(name: str, place: Place, start: int, end: int, own: int | None = None, about: str = "") -> None:
        first, last = (recorder.began + second * SECOND for second in (start, end))
        own_time = last - first if own is None else own * SECOND
        recorder.take([Span(name, about, place, first, last, own_time)])

    one, two = Place(11, "MainThread"), Place(12, "MainThread")
    for client in ("kitchen", "garden"):
        add("training", one, 3 if client == "kitchen" else 5, 5 if client == "kitchen" else 7, about=client)
    add("encoding", one, 7, 8)
    add("waiting", recorder.home, 3, 8)
    add(ROUND, recorder.home, 2, 8, 1, "1")
    add("report", recorder.home, 8, 9)
    for number, place in enumerate((one, two), 1):
        add(WORKER, place, 1, 9, 0, f"worker {number}")
    return recorder


def profile_of(recorder: Recorder) -> Profile:
    return Profile(recorder, recorder.began + 10 * SECOND)


def test_the_rows_of_the_server_add_up_to_its_time() -> None:
    rows = {row.work: (row.seconds, row.share, row.calls) for row in profile_of(recorded()).server()}
    assert rows == {
        "waiting": (5.0, 0.5, 1),
        REST: (1.0, 0.1, 1),
        "report": (1.0, 0.1, 1),
        OTHERWISE: (pytest.approx(3.0), pytest.approx(0.3), None),
    }


def test_the_rows_of_the_workers_add_up_to_their_lives_and_the_rest_is_idle() -> None:
    rows = {row.work: (row.seconds, row.share, row.calls) for row in profile_of(recorded()).workers()}
    assert rows == {"training": (4.0, 0.25, 2), "encoding": (1.0, 1 / 16, 1), IDLE: (11.0, 11 / 16, None)}


def test_a_run_without_workers_has_only_the_rows_of_the_server() -> None:
    profile = profile_of(Recorder())
    assert profile.workers() == []
    assert [row.work for row in profile.server()] == [OTHERWISE]
    assert len(list(profile.table())) == 4


def test_the_table_says_how_many_spans_the_trace_does_not_have() -> None:
    profile = profile_of(recorded(most=2))
    assert list(profile.table())[-1] == "trace.json has the first 5 spans and not the other 3"
    assert [row.work for row in profile.server()] == [row.work for row in profile_of(recorded()).server()]
    assert not any("trace.json" in line for line in profile_of(recorded()).table())


def test_the_trace_names_processes_and_threads_and_nests_spans(tmp_path: Path) -> None:
    (tmp_path / TRACE).write_text(profile_of(recorded()).trace(), encoding="utf-8")
    spans = read_trace(tmp_path / TRACE)
    assert {span["thread"] for span in spans} == {"server", "worker 1", "worker 2"}
    (garden,) = [span for span in spans if span.get("args") == {"about": "garden"}]
    assert (garden["name"], garden["ts"], garden["dur"], garden["pid"]) == ("training", 5e6, 2e6, 11)


@pytest.mark.parametrize("error", [None, KeyboardInterrupt(), ValueError("broken")])
def test_table_and_trace_are_written_however_the_run_ends(error: BaseException | None, tmp_path: Path) -> None:
    def run() -> None:
        with profiling(notes) as keep:
            keep(tmp_path)
            with span(ROUND, "1"), span("training"):
                if error is not None:
                    raise error

    notes = Notes()
    if error is None:
        run()
    else:
        with pytest.raises(type(error)):
            run()
    assert [span["name"] for span in read_trace(tmp_path / TRACE)] == [ROUND, "training"]
    table = (tmp_path / PROFILE).read_text(encoding="utf-8")
    assert table in "\n".join(notes.lines)
    assert "training" in table


def test_a_run_that_did_not_begin_leaves_no_files_and_shows_no_table(tmp_path: Path) -> None:
    notes = Notes()
    with pytest.raises(ValueError, match="no such job"), profiling(notes):
        raise ValueError("no such job")
    assert notes.lines == []


def test_a_profile_that_cannot_be_written_does_not_hide_how_the_run_ended(tmp_path: Path) -> None:
    def run() -> None:
        with profiling(notes) as keep:
            keep(tmp_path / "gone")
            raise KeyboardInterrupt

    notes = Notes()
    with pytest.raises(KeyboardInterrupt):
        run()
    assert notes.lines[-1].startswith("the profile was not written: ")


def test_seconds_are_real_ones(tmp_path: Path) -> None:
    began = time.monotonic()
    with profiling(Silent()) as keep:
        keep(tmp_path)
        with span("sleeping"):
            time.sleep(0.05)
    (sleeping,) = read_trace(tmp_path / TRACE)
    assert 0.05e6 <= sleeping["dur"] <= (time.monotonic() - began) * 1e6
