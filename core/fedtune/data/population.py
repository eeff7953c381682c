"""The population of a simulation: its clients, and the records of each of them.

Files and the demo's households are read when their client trains, so that a thousand clients need no more memory than
the few that are active; only a file that is partitioned among clients is read at once. The partition uses a seed:

    iid                       equal shares of the shuffled records
    dirichlet:ALPHA           shares of sizes p ~ Dir(ALPHA, ..., ALPHA)
    dirichlet:ALPHA:FIELD     for each value of FIELD its own p ~ Dir(ALPHA, ...): clients differ in what they hold
    by-field:FIELD            each value of FIELD is a client

The Dirichlet label skew is that of Hsu, Qi and Brown (2019); the smaller ALPHA, the more the clients differ.
"""

from __future__ import annotations

import glob
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedtune.core.errors import DataError, JobError
from fedtune.core.job.settings import DEMO, DataSettings
from fedtune.core.seeds import generator
from fedtune.data.records import Record, check_field, read_records
from fedtune.demo import Household, Row, make_evaluation, make_households

Dealt = dict[str, list[Record]]

DEMO_SOURCE = Path("demo")
SAMPLED_CLIENTS = 200
_DRAWS = 20  # attempts at a Dirichlet partition in which every client has a record


class Population:
    """The clients of a simulation.

    Args:
        data: data settings of the job.
        seed: seed of the job.

    Attributes:
        shared_bad_lines: bad lines that were skipped in files whose records are dealt to clients.

    Raises:
        DataError: nothing matches `data.train`, or a record lacks the field of `data.balance`.
        JobError: the records cannot be partitioned.
    """

    def __init__(self, data: DataSettings, seed: int) -> None:
        self._data = data
        self._paths: dict[str, Path] = {}
        self._households: dict[str, Household] = {}
        self._parts: Mapping[str, list[Record]] = {}
        self._bad_lines: dict[str, int] = {}
        self.shared_bad_lines = 0
        if data.train == DEMO:
            households = make_households(data.clients, seed, data.examples_per_client)
            width = max(3, len(str(data.clients - 1)))
            self._households = {f"{household.index:0{width}d}": household for household in households}
            try:
                rows = households[0].rows  # a number that is too large is reported now, not in round 17
            except ValueError as error:
                raise JobError([f"data.examples_per_client = {data.examples_per_client:,}: {error}"]) from None
            if data.balance is not None:
                check_field(map(_of_household, rows), data.balance, DEMO_SOURCE)
        elif data.partition == "by-file":
            self._paths = _named(training_files(data))
            for name in self._paths:  # a problem in any file is reported now, not in round 17
                self.records(name)
        else:
            files = training_files(data)
            found = [self._read(path) for path in files]
            records = [record for good, _ in found for record in good]
            self.shared_bad_lines = sum(bad for _, bad in found)
            self._parts = partition_records(records, data.partition, data.clients, seed)
        self.names = tuple(self._households or self._paths or self._parts)

    def source(self, name: str) -> Path:
        """Returns the source of a client's records, for messages to people."""
        if self._households:
            return DEMO_SOURCE / name
        return self._paths.get(name, Path(self._data.train))

    def records(self, name: str) -> list[Record]:
        """Returns one client's records.

        Raises:
            DataError: its file is missing, empty or broken.
        """
        if self._households:
            return [_of_household(row) for row in self._households[name].rows]
        if self._paths:
            records, self._bad_lines[name] = self._read(self._paths[name])
            return records
        return self._parts[name]

    def bad_lines(self, name: str) -> int:
        """Returns how many bad lines of a client's own file were skipped."""
        return self._bad_lines.get(name, 0)

    def sample(self, clients: int = SAMPLED_CLIENTS) -> list[Record]:
        """Returns all records of at most this many clients, spread evenly over the names."""
        step = -(-len(self.names) // clients)
        return [record for name in self.names[::step] for record in self.records(name)]

    def _read(self, path: Path) -> tuple[list[Record], int]:
        records, bad = read_records(path, skip_bad=self._data.skip_bad)
        if self._data.balance is not None:
            check_field(records, self._data.balance, path)
        return records, bad


def evaluation_records(data: DataSettings) -> list[Record]:
    """Returns the server's held-out records; none where the job names none."""
    if not data.evaluation:
        return []
    if data.evaluation == DEMO:
        return [Record(row["completion"], row["prompt"]) for row in make_evaluation()]
    return read_records(Path(data.evaluation), skip_bad=data.skip_bad)[0]


def partition_records(records: Sequence[Record], partition: str, clients: int, seed: int) -> Dealt:
    """Deals every record to one client.

    Args:
        partition: one of the partitions above.
        clients: number of clients for "iid" and "dirichlet".
        seed: seed of the partition.

    Returns:
        Client name -> its records, at least one.

    Raises:
        JobError: a record lacks the field, or some client would have no record.
    """
    kind, _, arguments = partition.partition(":")
    if kind == "by-field":
        return dict(sorted(_groups(records, arguments).items()))
    if len(records) < clients:
        raise JobError([f"data.clients is {clients}, but there are only {len(records)} records; expected one each"])
    random = generator(seed, "partition")
    if kind == "iid":
        return _deal(records, random.permutation(np.arange(len(records)) % clients), clients)
    alpha, _, field = arguments.partition(":")
    if float(alpha) <= 0:
        raise JobError([f'data.partition is "{partition}"; expected ALPHA above 0'])
    groups = [group for _, group in sorted(_groups(records, field).items())] if field else [list(records)]
    for _ in range(_DRAWS):
        shares = random.dirichlet(np.full(clients, float(alpha)), size=len(groups))
        owners = [random.choice(clients, len(group), p=share) for group, share in zip(groups, shares, strict=True)]
        dealt = _deal([record for group in groups for record in group], np.concatenate(owners), clients)
        if all(dealt.values()):
            return dealt
    raise JobError([f'data.partition is "{partition}", which left some of {clients} clients empty; raise ALPHA'])


def training_files(data: DataSettings) -> list[Path]:
    """Returns the files of the training data in the order of their names; none for the demo's households.

    Raises:
        DataError: nothing matches `data.train`.
    """
    return [] if data.train == DEMO else matching_files(data.train)


def matching_files(pattern: str) -> list[Path]:
    """Returns the files that a path or pattern matches, in the order of their names.

    Raises:
        DataError: there is none.
    """
    # Path.glob refuses the absolute patterns to which a job's paths are resolved.
    matches = sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207
    paths = [Path(match) for match in matches if Path(match).is_file()]
    if not paths:
        raise DataError(Path(pattern), "no such file; expected a data file, or a pattern that matches some")
    return paths


def _of_household(row: Row) -> Record:
    return Record(row["completion"], row["prompt"], fields={"skill": row["skill"]})


def _named(paths: list[Path]) -> dict[str, Path]:
    """Names clients after their files, or after their paths where two files have the same name."""
    stems = [path.stem for path in paths]
    return {path.stem if stems.count(path.stem) == 1 else str(path): path for path in paths}


def _groups(records: Sequence[Record], field: str) -> dict[str, list[Record]]:
    groups: dict[str, list[Record]] = defaultdict(list)
    for number, record in enumerate(records, start=1):
        if field not in record.fields:
            fields = ", ".join(record.fields) or "none"
            raise JobError([f'data.partition goes by "{field}", but record {number} has no such field, only {fields}'])
        groups[record.fields[field]].append(record)
    return groups


def _deal(records: Sequence[Record], owners: npt.NDArray[np.int64], clients: int) -> Dealt:
    names = [f"{index:0{len(str(clients - 1))}d}" for index in range(clients)]
    dealt: Dealt = {name: [] for name in names}
    for record, owner in zip(records, owners.tolist(), strict=True):
        dealt[names[owner]].append(record)
    return dealt
