"""Calibrations: a device's record of how far predictions were off in trial steps, and of the time of a token.

store.keep(key, Calibration(kappa=..., seconds_per_token=..., threads=...))
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

LIKELY_KAPPA = (0.2, 5.0)
_MOST_THREADS = 4096


@dataclass(frozen=True)
class Calibration:
    """The calibration of one device and model.

    Args:
        kappa: measured over predicted memory, of the part that a plan can change.
        seconds_per_token: time per token of a training step.
        threads: the number of threads with which it takes that time, and with which models are trained.
    """

    kappa: float
    seconds_per_token: float
    threads: int


class CalibrationStore:
    """Calibrations on disk, one small file each.

    Args:
        folder: created when first needed.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, key: str) -> Calibration | None:
        """Returns the stored calibration; None where it is missing, damaged or impossible."""
        try:
            found = json.loads(self._path(key).read_text(encoding="utf-8"))
            numbers = float(found["kappa"]), float(found["seconds_per_token"])
            calibration = Calibration(*numbers, int(found["threads"]))
        except (OSError, ValueError, KeyError, TypeError, OverflowError):
            return None
        low, high = LIKELY_KAPPA
        likely = low <= calibration.kappa <= high and 0 < calibration.seconds_per_token < 3600
        return calibration if likely and 1 <= calibration.threads <= _MOST_THREADS else None

    def keep(self, key: str, calibration: Calibration) -> None:
        """Stores a calibration."""
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(asdict(calibration)), encoding="utf-8")
        temporary.replace(path)

    def _path(self, key: str) -> Path:
        return self._folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
