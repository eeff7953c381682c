"""The clients that a job's data makes, and the records each of them has.

Files and the demo's households are read when a client's turn comes, so that a thousand clients cost no more memory than
the few that are at work; only a file that is split among clients is read at once.
"""

from __future__ import annotations

import glob
from collections.abc import Mapping
from pathlib import Path

from fedtune.core.errors import DataError
from fedtune.core.job.settings import DEMO, DataSettings
from fedtune.data.partition import partition_records
from fedtune.data.records import Record, read_records
from fedtune.demo import Household, make_evaluation, make_households

DEMO_SOURCE = Path("demo")


class Population:
    """The clients of a simulation.

    Args:
        data: the job's.
        seed: the job's.

    Raises:
        DataError: nothing matches `data.train`, or a file that is to be split cannot be.
    """

    def __init__(self, data: DataSettings, seed: int) -> None:
        self._data = data
        self._paths: dict[str, Path] = {}
        self._households: dict[str, Household] = {}
        self._parts: Mapping[str, list[Record]] = {}
        if data.train == DEMO:
            households = make_households(data.clients, seed, data.examples_per_client)
            width = max(3, len(str(data.clients - 1)))
            self._households = {f"{household.index:0{width}d}": household for household in households}
        elif data.partition == "by-file":
            self._paths = _named(_matches(data.train))
            for name in self._paths:  # a mistake in any file is told now, not in round 17
                self.records(name)
        else:
            files = _matches(data.train)
            records = [record for path in files for record in read_records(path, skip_bad=data.skip_bad)[0]]
            self._parts = partition_records(records, data.partition, data.clients, seed)
        self.names = tuple(self._households or self._paths or self._parts)

    def source(self, name: str) -> Path:
        """Where a client's records come from, for messages to people."""
        if self._households:
            return DEMO_SOURCE / name
        return self._paths.get(name, Path(self._data.train))

    def records(self, name: str) -> list[Record]:
        """One client's records.

        Raises:
            DataError: its file is missing, empty or broken.
        """
        if self._households:
            return [Record(row["completion"], row["prompt"]) for row in self._households[name].rows]
        if self._paths:
            return read_records(self._paths[name], skip_bad=self._data.skip_bad)[0]
        return self._parts[name]


def evaluation_records(data: DataSettings) -> list[Record]:
    """The server's held-out records; none where the job names none."""
    if not data.evaluation:
        return []
    if data.evaluation == DEMO:
        return [Record(row["completion"], row["prompt"]) for row in make_evaluation()]
    return read_records(Path(data.evaluation), skip_bad=data.skip_bad)[0]


def _matches(pattern: str) -> list[Path]:
    # Not Path.glob, which refuses the absolute patterns that a job's paths are resolved to.
    matches = sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207
    paths = [Path(match) for match in matches if Path(match).is_file()]
    if not paths:
        raise DataError(Path(pattern), "no such file; expected a data file, or a pattern that matches some")
    return paths


def _named(paths: list[Path]) -> dict[str, Path]:
    """Clients are named after their files, or after their paths where two files have one name."""
    stems = [path.stem for path in paths]
    return {path.stem if stems.count(path.stem) == 1 else str(path): path for path in paths}
