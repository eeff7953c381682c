"""The settings of a run's costs: the prices by which they become money, and the budgets that end a run."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

_STRICT = ConfigDict(extra="forbid", strict=True)
_PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True, config=_STRICT)
class CostSettings:
    """[cost]: prices, and power where no meter reads it. A run without a price has no money figure.

    Args:
        currency: name of the money that prices are in, such as "EUR".
        kwh: price of a kilowatt-hour.
        gb_up, gb_down: price of 10^9 payload bytes from clients to the server, and from the server to clients.
        hour: price of an hour of the machine that runs the rounds: the server, or a simulation with all its clients.
        device_hour: price of an hour of a device's work: its training as it reports it, or under secure aggregation,
            where it reports nothing, the time until its update has arrived. In a simulation clients wait for each other
            on one machine, which `hour` prices.
        watts: power of the machine that runs the rounds, where you know it; joules are then "stated". Without it they
            come from fedtune[energy], where that is installed.
        target: value of the job's metric whose cost the report tells; without it, nine tenths of the best one reached.
    """

    currency: Annotated[str, Field(min_length=1, max_length=12)] = "EUR"
    kwh: _NonNegativeFloat | None = None
    gb_up: _NonNegativeFloat | None = None
    gb_down: _NonNegativeFloat | None = None
    hour: _NonNegativeFloat | None = None
    device_hour: _NonNegativeFloat | None = None
    watts: _PositiveFloat | None = None
    target: _PositiveFloat | None = None

    @property
    def priced(self) -> bool:
        """True if there is any price."""
        return any(price is not None for price in (self.kwh, self.gb_up, self.gb_down, self.hour, self.device_hour))


@dataclass(frozen=True, config=_STRICT)
class BudgetSettings:
    """[budget]: limits at which a run ends before its last round, with all of its files. A round is not begun if one as
    costly as the mean of those so far would exceed a limit.

    Args:
        bytes: payload bytes, up and down.
        joules: joules of the machine that runs the rounds.
        money: money by the prices of [cost], in their currency.
        seconds: seconds from the run's begin, without the time between a stop and the resumption.
    """

    bytes: Annotated[int, Field(ge=1)] | None = None
    joules: _PositiveFloat | None = None
    money: _PositiveFloat | None = None
    seconds: _PositiveFloat | None = None
