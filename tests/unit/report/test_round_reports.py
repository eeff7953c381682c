"""A run's report while it goes on: of the rounds so far, seldom, and never over the one at its end."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from fedtune.server.round_reports import PAUSE_SECONDS, RoundReports
from fedtune.server.run_directory import REPORT

MakeRun = Callable[..., Path]
WAITS = (sys.executable, "-c", "import time; time.sleep(60)")


class Clock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def notes(file: Path, text: str = "x") -> tuple[str, ...]:
    """Returns a command that appends to a file."""
    return (sys.executable, "-c", f"open({str(file)!r}, 'a').write({text!r})")


def after(reports: RoundReports, clock: Clock, seconds: float) -> None:
    """Ends a round at this time, and waits for the report that it may begin."""
    clock.seconds = seconds
    reports.after_round()
    if reports._process is not None:
        assert reports._process.wait(30) == 0


def test_a_report_is_written_after_a_round_and_not_again_for_some_minutes(tmp_path: Path) -> None:
    clock, written = Clock(), tmp_path / "written"
    with RoundReports(tmp_path, notes(written), clock) as reports:
        after(reports, clock, PAUSE_SECONDS - 1)
        assert not written.exists()
        for seconds in (0, 1, PAUSE_SECONDS - 1, PAUSE_SECONDS, PAUSE_SECONDS + 1):
            after(reports, clock, PAUSE_SECONDS + seconds)
    assert written.read_text() == "xx"


def test_rounds_do_not_wait_for_a_report_and_no_two_are_written_at_once(tmp_path: Path) -> None:
    clock = Clock()
    began = time.monotonic()
    with RoundReports(tmp_path, WAITS, clock) as reports:
        clock.seconds = PAUSE_SECONDS
        reports.after_round()
        first = reports._process
        clock.seconds = 3 * PAUSE_SECONDS
        reports.after_round()
        assert first is not None
        assert reports._process is first
        assert psutil.Process(first.pid).nice() == 19
    assert first.poll() is not None  # nothing older replaces the report of the end
    assert time.monotonic() - began < 30


def test_it_also_ends_where_the_run_fails(tmp_path: Path) -> None:
    clock = Clock()
    reports = RoundReports(tmp_path, WAITS, clock)
    clock.seconds = PAUSE_SECONDS
    with suppress(RuntimeError), reports:
        reports.after_round()
        raise RuntimeError
    assert reports._process is not None
    assert reports._process.poll() is not None


def test_the_report_of_a_run_under_way_is_that_of_the_command(make_run: MakeRun) -> None:
    run, clock = make_run(finished=False), Clock()
    (run / REPORT).unlink(missing_ok=True)
    with RoundReports(run, now=clock) as reports:
        after(reports, clock, PAUSE_SECONDS)
    assert "<html" in (run / REPORT).read_text(encoding="utf-8")
