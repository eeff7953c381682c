"""Whether a device trains now is its own decision, by what it can see of itself."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fedtune.client.plan.eligibility import Requirements, not_now
from fedtune.client.plan.probe import probe

MACHINE = replace(probe(), battery=None, charging=None, temperature=None)


@pytest.mark.parametrize(
    ("battery", "charging", "temperature", "metered", "reason"),
    [
        (None, None, None, None, None),
        (90.0, False, 60.0, False, None),
        (10.0, True, 60.0, False, None),
        (79.0, False, None, False, "battery at 79% and not charging; 80% are needed"),
        (None, None, 91.0, False, "91 °C; at most 80 °C are allowed"),
        (None, None, None, True, "the link is metered"),
    ],
)
def test_a_device_says_why_it_does_not_train_now(
    battery: float | None, charging: bool | None, temperature: float | None, metered: bool | None, reason: str | None
) -> None:
    machine = replace(MACHINE, battery=battery, charging=charging, temperature=temperature)
    assert not_now(machine, metered, Requirements()) == reason


def test_a_metered_link_will_do_where_the_owner_says_so() -> None:
    assert not_now(MACHINE, True, Requirements(metered=True)) is None
