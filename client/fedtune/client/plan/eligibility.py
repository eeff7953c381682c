"""Whether a device should train now: on mains or with a battery reserve, not hot, on a link that costs nothing.

A device decides this for itself before it says that it can be reached; the server never learns why not.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedtune.client.plan.probe import Machine


@dataclass(frozen=True)
class Requirements:
    """What must hold.

    Args:
        battery_reserve: percent, below which a device that is not charging does not train.
        hottest: degrees Celsius of the hottest sensor.
        metered: whether a metered link will do.
    """

    battery_reserve: float = 80.0
    hottest: float = 80.0
    metered: bool = False


def not_now(machine: Machine, metered: bool | None, requirements: Requirements) -> str | None:
    """Why the device should not train now, or None. What a system does not expose is not held against it.

    Args:
        metered: whether the link is; None where that is not known.
    """
    if machine.battery is not None and not machine.charging and machine.battery < requirements.battery_reserve:
        return f"battery at {machine.battery:.0f}% and not charging; {requirements.battery_reserve:.0f}% are needed"
    if machine.temperature is not None and machine.temperature > requirements.hottest:
        return f"{machine.temperature:.0f} °C; at most {requirements.hottest:.0f} °C are allowed"
    if metered and not requirements.metered:
        return "the link is metered"
    return None
