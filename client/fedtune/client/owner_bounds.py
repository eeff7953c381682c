"""The bounds that a device's owner sets on what a server may do with it, whatever the server says."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as validated


@validated(frozen=True, config=ConfigDict(extra="forbid", strict=True))
class Bounds:
    """Bounds on cohorts, fleet and sums. docs/secure-aggregation.md says what each of them protects from.

    Args:
        min_cohort: fewest clients with which the device's update is summed, its own included.
        max_corrupt: share of a cohort that may collude with the server.
        max_devices: most devices of the fleet; None for no bound.
        max_rounds: most sums of one job that the device takes part in; None for no bound.
        min_difference: fewest clients by which two different sets of survivors of one job must differ; 0 for no bound.
        max_epsilon: ε at δ = OWNER_DELTA that all jobs together may spend; the device then refuses jobs without
            differential privacy. None for no bound.
    """

    min_cohort: Annotated[int, Field(ge=3)] = 3
    max_corrupt: Annotated[float, Field(ge=0, lt=1)] = 0.1
    max_devices: Annotated[int, Field(ge=1)] | None = None
    max_rounds: Annotated[int, Field(ge=1)] | None = None
    min_difference: Annotated[int, Field(ge=0)] = 0
    max_epsilon: Annotated[float, Field(gt=0, le=1000)] | None = None

    @property
    def shown(self) -> str:
        """The bounds in one line."""
        return ", ".join(f"{name} {'none' if value is None else value}" for name, value in asdict(self).items())


DEFAULT_BOUNDS = Bounds()
