"""The display of a run: plain lines when piped, a table and answers at the end."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from fedtune.core.ledger import Ledger
from fedtune.core.round_records import ClientRecord, Evaluation, RoundRecord
from fedtune.server.run_display import (
    Terminal,
    WorkProgress,
    format_bytes,
    format_seconds,
    print_summary,
    what_the_server_saw,
)

SUMMARY = {
    "rounds": 2,
    "clients": 3,
    "eval_before": Evaluation(4.0, 0.0, 10, 100, "rouge-l", 0.1).to_json(),
    "eval_after": Evaluation(0.1, 0.9, 10, 100, "rouge-l", 0.777).to_json(),
    "scores_from": "the server's held-out examples (data.evaluation = eval.jsonl)",
    "client_evaluation": None,
    "bytes": {"total": 1_000_000},
    "fp32_fedavg_bytes": 40_000_000,
    "fp32_fedavg_rank": 16,
    "traffic_ratio": 40.0,
    "traffic": Ledger().sent("adapter", 600_000).received("update", 400_000).to_json(),
    "privacy": None,
    "secure_aggregation": {
        "enabled": True,
        "sums": 2,
        "groups": 1,
        "summed_least": 3,
        "minimum": 3,
        "threshold": 2,
        "evaluations_shown": True,
    },
    "tiers": [
        {"tier": 16, "asked": 40, "merged": 3, "sat_out": 0, "updates": 38, "share": 0.76},
        {"tier": 4, "asked": 20, "merged": 0, "sat_out": 7, "updates": 12, "share": 0.24},
    ],
    "seconds": 65.0,
    "peak_rss_mb": 512.3,
    "records": {"read": 100, "kept": 97, "duplicate": 2, "too_long": 1, "bad": 0},
    "answers": [{"prompt": "[bold]oven on\x1b[2J", "before": "?", "after": "x" * 500, "expected": "{}"}],
    "paths": {"adapter": "runs/demo-1/adapter"},
}


def printed(live: bool = False) -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(file=stream, width=100, force_terminal=live, highlight=False), stream


def test_the_summary_of_a_run_that_only_clients_scored_has_their_loss_too() -> None:
    console, stream = printed()
    own = Evaluation(0.25, 0.6, 30, 300).to_json()
    print_summary(console, SUMMARY | {"eval_before": None, "eval_after": None, "client_evaluation": own})
    for part in ("exact match on the clients' own held-out data", "60.0%", "loss on the clients'", "0.250"):
        assert part in stream.getvalue()


def test_the_summary_says_what_changed_and_what_it_cost() -> None:
    console, stream = printed()
    print_summary(console, SUMMARY)
    text = stream.getvalue()
    for part in (
        "0.0%",
        "90.0%",
        "77.7%",
        "scores from: the server's held-out examples",
        "40.0 MB",
        "1.0 MB",
        "40.0x",
        "600.0 kB",
        "adapter",
        "trained less",
        "76%",
        "The server saw 2 sums, each over 3 clients",
        "1:05",
        "512 MB",
        "2 duplicate, 1 too long",
        "runs/demo-1",
    ):
        assert part in text
    assert "[bold]oven on" in text, "what people wrote is not markup"
    assert max(map(len, text.splitlines())) <= 100


def test_the_summary_tells_the_price_of_groups() -> None:
    once = what_the_server_saw({**SUMMARY["secure_aggregation"], "sums": 1})  # type: ignore[dict-item]
    assert once.startswith("The server saw 1 sum, each over 3 clients or more")
    told = what_the_server_saw({**SUMMARY["secure_aggregation"], "sums": 6, "groups": 3})  # type: ignore[dict-item]
    assert told.startswith("The server saw 6 sums, up to 3 a round, each over 3 clients or more")


def test_a_piped_run_prints_a_line_a_round_and_why_clients_dropped() -> None:
    console, stream = printed()
    clients = (ClientRecord("ann", traffic=Ledger().received("update", 10)), ClientRecord("bob", dropped="[red]gone"))
    with Terminal(console) as display:
        display.begin(0, 2, 2, moved=0)
        for client in clients:
            display.client(client)
        display.round(RoundRecord(1, 1.0, "b", 1e-3, clients, 0.5, eval=Evaluation(0.4, 0.25, 8, 80)))
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("round 1/2  loss 0.500  exact match 25.0%  1 of 2 clients dropped  10 B moved")
    assert lines[1] == "  client bob dropped: [red]gone"


def test_a_run_that_goes_on_counts_the_bytes_of_its_earlier_rounds() -> None:
    console, stream = printed()
    with Terminal(console) as display:
        display.begin(1, 2, 1, moved=1000)
        clients = (ClientRecord("ann", traffic=Ledger().received("update", 10)),)
        display.round(RoundRecord(2, 1.0, "b", 1e-3, clients, 0.5))
    assert "1.0 kB moved" in stream.getvalue()


def test_a_terminal_gets_a_bar() -> None:
    console, stream = printed(live=True)
    with Terminal(console) as display:
        display.begin(1, 4, 2, moved=0)
        display.client(ClientRecord("ann"))
        display.client(ClientRecord("bob", dropped="gone"))
        display.round(RoundRecord(2, 1.0, "b", 1e-3, (), None, aborted="nobody"))
    assert "round 2/4" in stream.getvalue()
    assert "client bob dropped: gone" in stream.getvalue()


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1234, "1.2 kB"), (5e6, "5.0 MB"), (7e12, "7.0 TB")]
)
def test_bytes_are_readable(count: float, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (65, "1:05"), (3725, "1:02:05")])
def test_durations_are_readable(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_an_evaluation_has_a_bar_from_its_beginning_to_its_end_before_and_between_rounds() -> None:
    console, stream = printed(live=True)
    with Terminal(console) as display:
        display.progress("evaluating", 0, 70)
        assert "evaluating" in stream.getvalue()
        display.progress("evaluating", 70, 70)
        display.begin(0, 2, 1, 0)
        stream.truncate(0)
        display.progress("evaluating", 0, 70)
        assert "round 1/2" in stream.getvalue()
        assert "evaluating" in stream.getvalue()
        display.progress("evaluating", 70, 70)
        stream.truncate(0)
        display.note("later")
    assert "evaluating" not in stream.getvalue()


def test_piped_a_long_evaluation_says_how_long_it_takes_and_a_short_one_nothing() -> None:
    lines: list[str] = []
    now = iter([0.0, 1.0, 2.0, 12.0, 20.0, 0.0, 0.5])
    work = WorkProgress(None, lines.append, lambda: next(now))
    for done in range(5):
        work.show("evaluating", done, 50)
    assert lines == ["evaluating: 2%, 0:49 left", "evaluating: 6%, 3:08 left"]
    for done in range(3):
        work.show("answering", done, 2)
    assert len(lines) == 2
