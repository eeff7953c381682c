"""The process that reads the machine's power by CodeCarbon; `fedtune.server.costs.power` starts it.

It answers every byte on its input with a line {"watts": mean power since the last answer, "source": "measured"}, and
ends with its input. It writes no file and calls no network: no output is switched on, whatever the user's own
configuration of CodeCarbon says, and without a country and a price of carbon there is nothing to look up.

"measured" means that the processor's power is read (RAPL); a GPU's always is (NVML). Otherwise CodeCarbon models the
processor by its load, so the sum is "estimated". The memory's power is its model in either case.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path

JOULES_PER_KWH = 3.6e6


class Machine:
    """The power of this machine since the last reading."""

    def __init__(self) -> None:
        logging.getLogger("codecarbon").disabled = True
        from codecarbon import OfflineEmissionsTracker  # type: ignore[import-not-found,import-untyped,unused-ignore]
        from codecarbon.core.cpu import (  # type: ignore[import-not-found,import-untyped,unused-ignore]
            is_rapl_available,
        )

        self._tracker = OfflineEmissionsTracker(
            output_methods=[],
            output_handlers=[],
            emissions_endpoint=None,
            electricitymaps_api_token="",
            force_carbon_intensity_g_co2e_kwh=0.0,
            log_level="critical",
            allow_multiple_runs=True,
            tracking_mode="machine",
        )
        self._source = "measured" if is_rapl_available() else "estimated"
        self._tracker.start_task()

    def reading(self) -> dict[str, object]:
        """Returns the mean power in watts since the last reading, and whether it is measured."""
        spent = self._tracker.stop_task()
        self._tracker.start_task()
        return {"watts": spent.energy_consumed * JOULES_PER_KWH / spent.duration, "source": self._source}


def main() -> None:
    """Answers until the input ends."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    with Path(os.devnull).open("w") as nothing:
        os.dup2(nothing.fileno(), sys.stdout.fileno())  # whatever else is printed
    machine = Machine()
    while sys.stdin.buffer.read(1):
        print(json.dumps(machine.reading()), file=answers, flush=True)


if __name__ == "__main__":
    main()
