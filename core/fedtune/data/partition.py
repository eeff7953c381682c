"""Which simulated client holds which of a data set's records, dealt out from a seed.

    iid                       equal shares of the shuffled records
    dirichlet:ALPHA           shares of sizes p ~ Dir(ALPHA, ..., ALPHA)
    dirichlet:ALPHA:FIELD     for each value of FIELD its own p ~ Dir(ALPHA, ...): clients differ in what they hold
    by-field:FIELD            each value of FIELD is a client

Dirichlet label skew as in Hsu, Qi and Brown (2019); the smaller ALPHA, the less alike the clients.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fedtune.core.errors import JobError
from fedtune.core.seeds import generator
from fedtune.data.records import Record

Clients = dict[str, list[Record]]

_DRAWS = 20  # of a Dirichlet partition, until every client has a record


def partition_records(records: Sequence[Record], partition: str, clients: int, seed: int) -> Clients:
    """Deals every record to one client.

    Args:
        partition: one of the above.
        clients: how many "iid" and "dirichlet" make.
        seed: the same one gives the same partition.

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
        return _named(records, random.permutation(np.arange(len(records)) % clients), clients)
    alpha, _, field = arguments.partition(":")
    if float(alpha) <= 0:
        raise JobError([f'data.partition is "{partition}"; expected ALPHA above 0'])
    groups = [group for _, group in sorted(_groups(records, field).items())] if field else [list(records)]
    for _ in range(_DRAWS):
        shares = random.dirichlet(np.full(clients, float(alpha)), size=len(groups))
        owners = [random.choice(clients, len(group), p=share) for group, share in zip(groups, shares, strict=True)]
        dealt = _named([record for group in groups for record in group], np.concatenate(owners), clients)
        if all(dealt.values()):
            return dealt
    raise JobError([f'data.partition is "{partition}", which left some of {clients} clients empty; raise ALPHA'])


def _groups(records: Sequence[Record], field: str) -> dict[str, list[Record]]:
    groups: dict[str, list[Record]] = defaultdict(list)
    for number, record in enumerate(records, start=1):
        if field not in record.fields:
            fields = ", ".join(record.fields) or "none"
            raise JobError([f'data.partition goes by "{field}", but record {number} has no such field, only {fields}'])
        groups[record.fields[field]].append(record)
    return groups


def _named(records: Sequence[Record], owners: npt.NDArray[np.int64], clients: int) -> Clients:
    names = [f"{index:0{len(str(clients - 1))}d}" for index in range(clients)]
    dealt: Clients = {name: [] for name in names}
    for record, owner in zip(records, owners.tolist(), strict=True):
        dealt[names[owner]].append(record)
    return dealt
