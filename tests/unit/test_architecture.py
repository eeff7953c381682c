"""docs/architecture.md agrees with the code: its drawing with the imports, its tables with the tables of the code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from dataclasses import replace
from typing import get_args

from house import DOCUMENT, ROOT, rewritten

from fedtune.client.live import device_status
from fedtune.core.round_records import ClientRecord, Evaluation, RoundRecord, SecureRecord, Work
from fedtune.core.secagg import client_session, server_session
from fedtune.strategies.round import TRANSITIONS


def rows(heading: str) -> list[list[str]]:
    """Returns the cells of the first table below a heading of the document, without the table's own head."""
    _, found, rest = DOCUMENT.read_text(encoding="utf-8").partition(f"\n{heading}\n")
    assert found, heading
    lines = re.search(r"(?:^\|.*\n)+", rest, re.MULTILINE)
    assert lines, heading
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines.group().splitlines()[2:]]


def named(cells: Iterable[str]) -> set[str]:
    """Returns the names in backticks."""
    return {name for cell in cells for name in re.findall("`([^`]+)`", cell)}


def test_the_drawing_has_exactly_the_arrows_of_the_code() -> None:
    document = DOCUMENT.read_text(encoding="utf-8")
    assert document == rewritten(document), "run `make house`"


def test_the_table_of_a_client_of_the_cohort_is_the_one_that_is_executed() -> None:
    assert rows("### A client of the cohort, in the server's round") == [
        [phase.name, event.name, after.name] for (phase, event), after in TRANSITIONS.items()
    ]


def test_the_table_of_a_client_in_a_secure_round_is_the_one_that_is_executed() -> None:
    answers = {exchange.message: exchange for exchange in client_session.EXCHANGES.values()}
    assert [[state, message, after] for state, message, _, after in rows("### A client in a secure round")] == [
        [exchange.state.__name__, message.__name__, exchange.after.__name__] for message, exchange in answers.items()
    ]


def test_the_answers_of_a_client_in_a_secure_round_are_the_messages_that_the_server_takes() -> None:
    assert [answer for _, _, answer, _ in rows("### A client in a secure round")] == [
        exchange.message.__name__ for exchange in server_session.EXCHANGES.values()
    ]


def test_the_table_of_the_server_in_a_secure_round_is_the_one_that_is_executed() -> None:
    assert rows("### The server in a secure round") == [
        [stage.name, exchange.message.__name__, exchange.after.name]
        for stage, exchange in server_session.EXCHANGES.items()
    ]


def test_the_table_of_a_live_device_is_the_one_that_is_executed() -> None:
    events = [event for event in get_args(device_status.Event) if event != "stops"]
    assert rows("### A live device") == [
        [state, *(device_status.TRANSITIONS.get((state, event), "") for event in events)]
        for state in get_args(device_status.State)
    ]
    assert f"| state | {' | '.join(events)} |" in DOCUMENT.read_text(encoding="utf-8")


def test_the_keys_of_a_round_are_those_that_a_run_writes() -> None:
    score = Evaluation(loss=1.0, exact_match=0.5, examples=2, tokens=3)
    record = RoundRecord(1, 2.0, "ab", 1e-3, (), None, eval=score, secure=SecureRecord(3, 3, 3))
    written = replace(record, work=(Work("training"),)).to_json()
    table = rows("Keys of an object in `rounds.jsonl`:")
    assert named(row[0] for row in table) == set(written)
    inner = {row[0].strip("`"): named(row[1:]) for row in table}
    assert inner["clients"] == set(ClientRecord("a").to_json())
    assert all(inner[key] == set(written[key]) for key in ("bytes", "eval", "secure"))
    assert inner["work"] == set(written["work"][0])


def test_the_keys_of_the_summary_are_those_that_a_run_writes() -> None:
    written = [
        {key.value for key in node.keys if isinstance(key, ast.Constant)}
        for path in (ROOT / "server").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Dict)
    ]
    (summary,) = [keys for keys in written if "traffic_ratio" in keys]
    assert named(row[0] for row in rows("Keys of `summary.json`:")) == summary
