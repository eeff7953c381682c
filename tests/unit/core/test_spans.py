"""Spans nest, add up, and cost nothing where nobody records."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Generator
from multiprocessing import get_context

import pytest

from fedtune.core.spans import (
    ROUND,
    WORKER,
    Place,
    Recorder,
    Span,
    absorb,
    add_span,
    drain,
    now,
    record_in_fork,
    recording,
    span,
)

ELSEWHERE = Place(1, "MainThread")


def elsewhere(name: str, own: int = 5) -> Span:
    return Span(name, "", ELSEWHERE, 0, own, own)


def test_without_a_recorder_every_span_is_the_same_nothing() -> None:
    assert span("training") is span("encoding", "kitchen", waits=True)
    absorb([elsewhere("training")])
    assert drain() == ()


def test_own_times_add_up_to_the_outermost_span() -> None:
    with recording(Recorder()) as recorder, span("outer"):
        for _ in range(3):
            with span("inner", "kitchen"), span("innermost"):
                pass
    outer = recorder.spans[-1]
    sums = recorder.sums(home=True)
    assert {name: each.calls for name, each in sums.items()} == {"outer": 1, "inner": 3, "innermost": 3}
    assert sum(each.own for each in sums.values()) == outer.end - outer.start
    assert all(outer.start <= each.start <= each.end <= outer.end for each in recorder.spans)
    assert {each.about for each in recorder.spans if each.name == "inner"} == {"kitchen"}


def test_a_span_that_waits_for_another_thread_has_no_time_of_its_own() -> None:
    with recording(Recorder()) as recorder, span("outer"), span("waiting", waits=True):
        time.sleep(0.01)
    sums = recorder.sums(home=True)
    assert sums["waiting"].own == 0
    outer, waiting = recorder.spans[-1], recorder.spans[0]
    assert sums["outer"].own == (outer.end - outer.start) - (waiting.end - waiting.start)


def test_sums_count_all_spans_and_a_bounded_number_is_kept() -> None:
    with recording(Recorder(most=2)) as recorder:
        for _ in range(5):
            with span("training"):
                pass
        with span(ROUND):
            pass
        add_span(WORKER, "worker 1", ELSEWHERE, now())
    assert [each.name for each in recorder.spans] == ["training", "training", ROUND, WORKER]
    assert recorder.dropped == 3
    assert recorder.sums(home=True)["training"].calls == 5


def test_time_within_rounds_is_told_apart_also_that_of_other_processes() -> None:
    with recording(Recorder()) as recorder:
        absorb([elsewhere("training", 3)])
        with span(ROUND, "1"):
            absorb([elsewhere("training", 4)])
            with span("selection"):
                pass
    training, selection, rounds = recorder.sums(home=False)["training"], *recorder.sums(home=True).values()
    assert (training.own, training.in_rounds) == (7, 4)
    assert selection.in_rounds == selection.own
    assert rounds.in_rounds == rounds.own


def test_spans_that_an_interruption_leaves_open_end_with_the_recording() -> None:
    def rounds() -> Generator[int, None, None]:
        with span(ROUND, "1"):
            yield 1

    def run() -> None:
        with recording(recorder):
            next(generator)
            with span("checkpoint"):
                raise KeyboardInterrupt

    generator, recorder = rounds(), Recorder()
    with pytest.raises(KeyboardInterrupt):
        run()
    assert [each.name for each in recorder.spans] == ["checkpoint", ROUND]
    generator.close()
    assert len(recorder.spans) == 2, "what ends after the recording is not recorded again"
    assert drain() == ()


def test_a_span_takes_those_within_it_along_that_were_left_open() -> None:
    with recording(Recorder()) as recorder, span("outer"):
        span("left").__enter__()
    left, outer = recorder.spans
    assert (left.name, outer.name) == ("left", "outer")
    assert left.end <= outer.end


def test_threads_have_places_and_nesting_of_their_own() -> None:
    def work() -> None:
        with span("training"):
            pass

    with recording(Recorder()) as recorder, span("waiting"):
        thread = threading.Thread(target=work, name="client-0")
        thread.start()
        thread.join()
    training, waiting = recorder.spans
    assert training.place == Place(os.getpid(), "client-0")
    assert waiting.place == recorder.home
    assert recorder.sums(home=False).keys() == {"training"}
    assert recorder.sums(home=True)["waiting"].own == waiting.end - waiting.start


def test_a_fork_records_for_itself_and_its_spans_are_on_the_same_clock() -> None:
    context = get_context("fork")
    ours, theirs = context.Pipe()

    def work() -> None:
        record_in_fork()
        with span("training", "kitchen"):
            pass
        theirs.send((drain(), drain()))

    with recording(Recorder()) as recorder:
        with span("before"):
            pass
        process = context.Process(target=work)
        began = now()
        process.start()
        first, second = ours.recv()
        process.join()
        absorb(first)
    (training,) = first
    assert second == ()
    assert training.place.process == process.pid
    assert began <= training.start <= training.end <= now()
    assert recorder.spans[-1] == training


def test_a_fork_of_a_process_that_does_not_record_does_not_either() -> None:
    record_in_fork()
    assert span("training") is span("encoding")
