"""Text and numbers from clients are made safe for a page."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.server.report.canvas import plausible, quantile
from fedtune.server.report.reading import Sum, clean, clean_line, read_run

ANY_TEXT = st.text(st.characters(), max_size=60)  # lone surrogates included
LOSSES = st.floats(allow_nan=False, allow_infinity=False)


@given(ANY_TEXT, st.integers(1, 40))
def test_clean_text_can_be_written_and_is_never_longer_than_asked(text: str, limit: int) -> None:
    shown = clean(text, limit)
    shown.encode("utf-8")
    assert len(shown) == min(len(text), limit)
    assert not set(shown) & set("\x00\x1b\u202e\u2066")


@given(ANY_TEXT)
def test_a_clean_line_has_no_break(text: str) -> None:
    assert len(clean_line(text, 40).splitlines()) <= 1


@given(st.text(st.characters(categories=["L", "N", "P", "S"]), max_size=30))
def test_ordinary_text_is_left_as_it_is(text: str) -> None:
    assert clean(text, 30) == text


@given(st.lists(st.one_of(st.none(), LOSSES), max_size=30))
def test_what_is_drawn_is_absent_or_within_a_hundred_times_the_median(losses: list[float | None]) -> None:
    kept, absurd = plausible(losses)
    given_up = sum(math.isnan(value) for value in kept)
    assert given_up == absurd + losses.count(None)
    sizes = sorted(abs(loss) for loss in losses if loss is not None)
    assert all(abs(value) <= 100 * max(sizes[len(sizes) // 2], 1.0) for value in kept if not math.isnan(value))


@given(st.lists(st.floats(0, 100), min_size=1, max_size=30), st.floats(0, 1))
def test_a_quantile_lies_between_the_extremes(values: list[float], share: float) -> None:
    ordered = sorted(values)
    assert ordered[0] - 1e-9 <= quantile(ordered, share) <= ordered[-1] + 1e-9


def test_the_median_of_two_values_is_half_way() -> None:
    assert quantile([1.0, 2.0], 0.5) == 1.5


def test_a_last_line_that_a_crash_cut_off_is_left_out(make_run: Callable[..., Path]) -> None:
    run = make_run(finished=False)
    with (run / "rounds.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"round": 4})[:-3])
    assert [line.round for line in read_run(run).rounds] == [1, 2, 3]


def test_a_run_knows_its_settings_by_dotted_name(make_run: Callable[..., Path]) -> None:
    assert read_run(make_run()).settings["federation.rounds"] == 20


def test_a_client_whose_own_time_is_hidden_worked_from_the_round_s_start(make_run: Callable[..., Path]) -> None:
    (first, *_) = read_run(make_run()).rounds
    client = first.clients[-1]
    begin, end = first.span(client)
    assert 0 < begin == pytest.approx(end - client.seconds)
    hidden = msgspec.structs.replace(first, secure=Sum(3, 3, 2, (), 1, 3))
    assert hidden.span(msgspec.structs.replace(client, seconds=0.0)) == (0.0, end)
