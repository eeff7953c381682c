"""Whether a device should train now: on mains or with a battery reserve, not hot, on a link that costs nothing.

    if reason := not_now(sense(), requirements): ...

A device decides this for itself. It tells the server which of its owner's conditions does not hold, and no reading.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as validated


@validated(frozen=True, config=ConfigDict(extra="forbid", strict=True))
class Requirements:
    """What must hold, as the device's owner wants it.

    Args:
        only_charging: whether a device with a battery must be charging.
        battery_reserve: percent, below which a device that is not charging does not train.
        max_temperature: degrees Celsius of the hottest sensor.
        unmetered_only: whether a metered link will not do.
    """

    only_charging: bool = False
    battery_reserve: Annotated[float, Field(ge=0, le=100)] = 80.0
    max_temperature: Annotated[float, Field(gt=0, le=150)] = 80.0
    unmetered_only: bool = False


DEFAULT_REQUIREMENTS = Requirements()


@dataclass(frozen=True)
class Sensors:
    """What the device sees of itself now; None for what the system does not expose.

    Args:
        battery: percent left.
        charging: whether it is plugged in.
        temperature: degrees Celsius of the hottest sensor.
        metered: whether the way out is mobile broadband. A hotspot behind Wi-Fi cannot be told from a home's.
    """

    battery: float | None
    charging: bool | None
    temperature: float | None
    metered: bool | None


@dataclass(frozen=True)
class Obstacle:
    """Why the device should not train now.

    Args:
        condition: which of its owner's does not hold; a server may know that.
        reading: the same with the numbers, for the owner.
    """

    condition: str
    reading: str


def not_now(sensors: Sensors, requirements: Requirements) -> Obstacle | None:
    """Why the device should not train now, or None. What a system does not expose is not held against it."""
    if sensors.battery is not None and not sensors.charging:
        level, reserve = sensors.battery, requirements.battery_reserve
        if requirements.only_charging:
            return Obstacle("not charging", f"battery at {level:.0f}% and not charging")
        if level < reserve:
            return Obstacle("battery low", f"battery at {level:.0f}% and not charging; {reserve:.0f}% are needed")
    if sensors.temperature is not None and sensors.temperature > requirements.max_temperature:
        allowed = f"at most {requirements.max_temperature:.0f} °C are allowed"
        return Obstacle("too hot", f"{sensors.temperature:.0f} °C; {allowed}")
    if sensors.metered and requirements.unmetered_only:
        return Obstacle("metered link", "the link is metered")
    return None
