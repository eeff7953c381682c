"""Eligibility: the conditions under which a device trains, on power, temperature and link.

    if reason := not_now(sense(), requirements): ...

A device decides for itself. It tells the server which of its owner's conditions fails, and no reading.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as validated

from fedtune.client.owner_bounds import DEFAULT_BOUNDS, Bounds


@validated(frozen=True, config=ConfigDict(extra="forbid", strict=True))
class Requirements:
    """The conditions under which a device trains, as set by its owner.

    Args:
        only_charging: whether a device with a battery must be charging.
        battery_reserve: percent below which a device that is not charging does not train.
        max_temperature: highest permitted temperature of the hottest sensor, in degrees Celsius.
        unmetered_only: whether the device trains on unmetered links only.
    """

    only_charging: bool = False
    battery_reserve: Annotated[float, Field(ge=0, le=100)] = 80.0
    max_temperature: Annotated[float, Field(gt=0, le=150)] = 80.0
    unmetered_only: bool = False


DEFAULT_REQUIREMENTS = Requirements()


@dataclass(frozen=True)
class Consent:
    """The consent of a device's owner.

    Args:
        allow_clear: whether the device takes part in jobs that do not mask updates.
        scores: whether it evaluates for the server, which then sees each of the device's scores.
        requirements: conditions under which the device takes part.
        bounds: what it demands of cohorts, fleet and sums.
    """

    allow_clear: bool = False
    scores: bool = False
    requirements: Requirements = DEFAULT_REQUIREMENTS
    bounds: Bounds = DEFAULT_BOUNDS


CAUTIOUS = Consent()


@dataclass(frozen=True)
class Sensors:
    """Readings of the device's sensors; None for values that the system does not expose.

    Args:
        battery: charge in percent.
        charging: whether it is plugged in.
        temperature: degrees Celsius of the hottest sensor.
        metered: whether the default route is mobile broadband. A hotspot behind Wi-Fi looks like any other Wi-Fi.
    """

    battery: float | None
    charging: bool | None
    temperature: float | None
    metered: bool | None


@dataclass(frozen=True)
class Obstacle:
    """The reason why the device should not train now.

    Args:
        condition: the owner's condition that fails; a server may know it.
        reading: the same with the numbers, for the owner.
    """

    condition: str
    reading: str


def not_now(sensors: Sensors, requirements: Requirements) -> Obstacle | None:
    """Returns the reason why the device should not train now, or None; missing readings fail no condition."""
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
