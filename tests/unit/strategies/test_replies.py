"""The time for which the server waits for replies."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from fedtune.core.host.clock import Clock
from fedtune.flower.strategy import stream_replies
from fedtune.strategies.schedule import Closing


class Reply:
    """The attributes of a Flower message that are read."""

    def __init__(self, number: str, failed: bool = False) -> None:
        self.metadata = type("Metadata", (), {"reply_to_message_id": number})()
        self.number, self._failed = number, failed

    def has_error(self) -> bool:
        return self._failed


class Clockwork:
    """A grid and a clock: replies arrive at their second, and sleeping advances the clock."""

    def __init__(self, arrivals: dict[str, float], failing: Iterable[str] = ()) -> None:
        self.now, self.arrivals, self.failing = 0.0, arrivals, set(failing)

    def push_messages(self, messages: Iterable[str]) -> list[str]:
        return list(messages)

    def pull_messages(self, numbers: Iterable[str]) -> list[Reply]:
        return [Reply(each, each in self.failing) for each in numbers if self.arrivals[each] <= self.now]

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def heard(clockwork: Clockwork, deadline: float | None = None, closing: Closing | None = None) -> tuple[str, float]:
    """Returns the replies that came, and the second at which waiting ended."""
    grid: Any = clockwork
    clock = Clock(monotonic=clockwork.monotonic, sleep=clockwork.sleep)
    messages: Any = list(clockwork.arrivals)
    numbers = sorted(reply.number for reply in stream_replies(grid, messages, deadline, closing, clock))  # type: ignore[attr-defined]
    return "".join(numbers), clockwork.now


ARRIVALS = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 50.0}


def test_everybody_is_waited_for_or_until_the_deadline() -> None:
    assert heard(Clockwork(ARRIVALS))[0] == "abcd"
    names, seconds = heard(Clockwork(ARRIVALS), deadline=10.0)
    assert names == "abc"
    assert seconds < 11.0


@pytest.mark.parametrize(
    ("closing", "names", "until"),
    [
        (Closing(seconds=10.0, enough=4, least=2), "abc", 10.0),
        (Closing(seconds=10.0, enough=2, least=1), "ab", 2.0),
        (Closing(seconds=2.5, enough=4, least=3), "abc", 3.0),  # too few were in time, so waiting goes on
        (Closing(seconds=2.5, enough=4, least=4), "abcd", 50.0),
    ],
)
def test_a_round_closes_with_enough_answers_or_at_its_time_and_never_with_too_few(
    closing: Closing, names: str, until: float
) -> None:
    came, seconds = heard(Clockwork(ARRIVALS), closing=closing)
    assert came == names
    assert until <= seconds < until + 0.6


def test_an_error_is_no_answer() -> None:
    clockwork = Clockwork(ARRIVALS, failing="a")
    assert heard(clockwork, closing=Closing(seconds=90.0, enough=2, least=1))[0] == "abc"
