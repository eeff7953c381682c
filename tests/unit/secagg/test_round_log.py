"""The round log: what a client has served outlives its process, is never forgotten, and never grows without bound."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from fedtune.core.errors import InputError
from fedtune.core.secagg import FileRoundLog, RoundMark, Served
from fedtune.core.secagg.round_log import MAX_LOG_BYTES

SERVED = Served(RoundMark(3, 1), 2, (("ada", "bob"),))


def test_a_round_log_remembers_each_job_across_restarts(tmp_path: Path) -> None:
    path = tmp_path / "rounds.json"
    assert FileRoundLog(path).of("a") == Served()
    FileRoundLog(path).record("a", SERVED)
    FileRoundLog(path).record("b", Served().opened(RoundMark(1, 0)))
    assert FileRoundLog(path).of("a") == SERVED
    assert FileRoundLog(path).of("b") == Served(RoundMark(1, 0))
    assert [file.name for file in tmp_path.iterdir()] == ["rounds.json"]


@pytest.mark.parametrize(
    "content",
    ["", "null", "{", '{"a": [3, 1]}', '{"a": {"last": ["1", 2]}}', '{"a": {"last": [true, 0]}}', '{"a": {"more": 1}}'],
)
def test_a_spoilt_round_log_is_an_error_and_never_an_empty_one(tmp_path: Path, content: str) -> None:
    path = tmp_path / "rounds.json"
    path.write_text(content)
    with pytest.raises(InputError, match="round log"):
        FileRoundLog(path).of("a")
    with pytest.raises(InputError, match="round log"):
        FileRoundLog(path).record("a", SERVED)
    assert path.read_text() == content


def test_a_full_round_log_takes_no_more_jobs_and_forgets_none(tmp_path: Path) -> None:
    """Jobs that it knows go on to their last round, whatever its number."""
    path = tmp_path / "rounds.json"
    names = tuple(f"{number:0128d}" for number in range(MAX_LOG_BYTES // 131 - 4))
    FileRoundLog(path).record("known", Served(RoundMark(1, 0), 1, (names,)))

    def name_more_jobs() -> None:
        for number in range(1000):
            FileRoundLog(path).record(f"job {number}", Served())

    with pytest.raises(InputError, match=r"is full after \d+ jobs, and forgets none"):
        name_more_jobs()
    log = FileRoundLog(path)
    log.record("known", log.of("known").masked(1 << 53))
    assert (log.of("known").last.round, log.of("known").sums) == (1 << 53, 2)
    assert log.of("known").survivors == (names,)
    with pytest.raises(InputError, match="is full"):
        log.record("known", log.of("known").voted({"a" * 128, "b" * 128}, keep=True))


def test_later_attempts_and_rounds_compare_greater_and_a_masked_round_is_closed() -> None:
    assert Served().last < RoundMark(0, 0)
    assert RoundMark(1, 0) < RoundMark(1, 1) < RoundMark(2, 0)
    assert RoundMark(1, 1 << 53) <= Served().masked(1).last < RoundMark(2, 0)


def test_a_set_of_survivors_is_kept_once(tmp_path: Path) -> None:
    served = Served()
    for survivors in ({"bob", "ada"}, {"ada", "cid"}, {"ada", "bob"}):
        served = served.voted(survivors, keep=True)
    assert served.survivors == (("ada", "cid"), ("ada", "bob"))
    assert served.voted({"cid"}, keep=False).survivors == (("cid",),)


def test_a_device_killed_at_any_instant_has_counted_every_update_that_left(tmp_path: Path) -> None:
    """A byte on the pipe stands for an update that left; of a hundred deaths none undercounts."""
    path, part, rng = tmp_path / "rounds.json", 0.25, random.Random(5)
    for _ in range(100):
        before, (reading, writing) = FileRoundLog(path).of("job").sums, os.pipe()
        if not (child := os.fork()):
            log = FileRoundLog(path)
            while True:
                served = log.of("job")
                log.record("job", served.masked(served.sums + 1, part))
                os.write(writing, b"x")
        os.close(writing)
        time.sleep(rng.random() * 0.02)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        left = 0
        while data := os.read(reading, 1 << 16):
            left += len(data)
        os.close(reading)
        served = FileRoundLog(path).of("job")
        assert before + left <= served.sums <= before + left + 1
        assert served.rho == part * served.sums
