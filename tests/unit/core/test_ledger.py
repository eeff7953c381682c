"""The ledger counts what travelled, and ledgers add up."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from fedtune.core.ledger import PROTOCOL, PURPOSES, Ledger, Purpose

events = st.lists(st.tuples(st.booleans(), st.sampled_from(PURPOSES), st.integers(0, 1 << 40)), max_size=30)
Events = list[tuple[bool, Purpose, int]]


def written(events: Events) -> Ledger:
    ledger = Ledger()
    for up, purpose, size in events:
        ledger = ledger.received(purpose, size) if up else ledger.sent(purpose, size)
    return ledger


@given(events)
def test_bytes_are_the_sum_of_the_messages(events: Events) -> None:
    ledger = written(events)
    assert ledger.bytes_up == sum(size for up, _, size in events if up)
    assert ledger.bytes_down == sum(size for up, _, size in events if not up)
    assert ledger.protocol_bytes == sum(size for _, purpose, size in events if purpose in PROTOCOL)
    assert sum(entry.messages for entry in (*ledger.up.values(), *ledger.down.values())) == len(events)


@given(events, events)
def test_ledgers_add_up_in_any_order(first: Events, second: Events) -> None:
    assert written(first) + written(second) == written(second) + written(first) == written(first + second)


@given(events)
def test_a_ledger_survives_json(events: Events) -> None:
    ledger = written(events)
    assert Ledger.from_json(json.loads(json.dumps(ledger.to_json()))) == ledger
