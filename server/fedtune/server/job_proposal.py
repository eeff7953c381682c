"""The proposal of a job for a base model and a data set: every key that depends on them, with a comment that says why.

    data = look_at("clients/*.jsonl")
    tokens, clients = Tokens.of(data.records, tokenizer), propose_clients(data, None)
    print(propose(Inputs("demo", "clients/*.jsonl"), data, tokens, clients))

It reads the first records, and no weights.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING

from fedtune.core.errors import DataError, JobError
from fedtune.core.job.secure_cohorts import secure_cohort_problems
from fedtune.core.job.settings import CORE_RANK, Job
from fedtune.data.lengths import MOST_MEASURED, places, token_lengths
from fedtune.data.population import matching_files, partition_records
from fedtune.data.records import Record, read_lines

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_READ = 10_000  # lines that are looked at
CLIENTS, ROUNDS, COHORT = 10, 20, 10
SKEW = 0.5  # alpha of a Dirichlet partition: clients differ clearly, and few of them are tiny
FEWEST_OWNERS, MOST_LABELS, REPEATS = 3, 50, 5
STEP_EXAMPLES, MOST_BATCH = 8, 4096
FEWEST_STEPS, MOST_STEPS = 5, 20
LONGEST, LONGEST_TEXT = 2048, 512  # tokens of an example that are proposed at most
CHARACTERS = 3  # of a token, where there is no tokenizer to count with: fewer than usual, so that little is cut
OWNERS = ("client", "user", "owner", "device", "customer", "patient", "author", "speaker", "site", "household")


@dataclass(frozen=True)
class DataSet:
    """The files of a data set and its first records.

    Args:
        bad: number of lines among the first that are no record.
    """

    files: Sequence[Path]
    records: Sequence[Record]
    bad: int

    @property
    def is_text(self) -> bool:
        """True if no record has a prompt, so that long ones are cut into several examples and nothing is lost."""
        return not any(record.prompt or record.messages for record in self.records)

    @property
    def form(self) -> str:
        """The form of the records, as people write it in a file."""
        forms = {"messages" if one.messages else "prompt" if one.prompt else "text" for one in self.records}
        names = {"messages": '{"messages"}', "prompt": '{"prompt", "completion"}', "text": '{"text"}'}
        return " and ".join(names[form] for form in names if form in forms)

    @property
    def fields(self) -> dict[str, int]:
        """The fields that all records have, each with the number of its values."""
        shared = set.intersection(*(set(record.fields) for record in self.records))
        ordered = [field for field in self.records[0].fields if field in shared and ":" not in field]
        return {field: len({record.fields[field] for record in self.records}) for field in ordered}


def look_at(pattern: str) -> DataSet:
    """Reads the first records of the files that a path or pattern matches.

    Raises:
        DataError: there is no such file, one cannot be read, or no line is a record.
    """
    files = matching_files(pattern)
    each = max(1, MOST_READ // len(files))
    lines = [line for file in files for line in islice(read_lines(file), each)]
    records = [line for line in lines if isinstance(line, Record)]
    if not records:
        raise next(line for line in lines if isinstance(line, DataError))
    return DataSet(files, records, len(lines) - len(records))


@dataclass(frozen=True)
class Tokens:
    """The lengths of records in tokens.

    Args:
        lengths: ascending; at least one.
        counted: whether the base's tokenizer has counted them; otherwise they follow from the number of characters.
    """

    lengths: Sequence[int]
    counted: bool

    @classmethod
    def of(cls, records: Sequence[Record], tokenizer: PreTrainedTokenizerBase | None) -> Tokens:
        """Counts or estimates the tokens of records.

        Raises:
            ModelError: the tokenizer cannot render the records.
        """
        some = records[:: -(-len(records) // MOST_MEASURED)]
        if tokenizer is not None and (lengths := token_lengths(some, tokenizer)):
            return cls(sorted(lengths), counted=True)
        said = [[record.prompt, record.completion, *(turn.content for turn in record.messages)] for record in some]
        return cls(sorted(1 + sum(map(len, texts)) // CHARACTERS for texts in said), counted=False)

    @property
    def mean(self) -> float:
        """The mean length."""
        return sum(self.lengths) / len(self.lengths)


@dataclass(frozen=True)
class Inputs:
    """The inputs as the job file names them: `base`, and `train`, a path or pattern."""

    base: str
    train: str


@dataclass(frozen=True)
class Clients:
    """A partition of the data, the number of its clients, and a comment about it."""

    partition: str
    number: int
    comment: str


def propose_clients(data: DataSet, wanted: int | None) -> Clients:
    """Returns the first partition that suits the data and gives every client a record.

    Args:
        wanted: number of clients; None where the data may decide.

    Raises:
        JobError: there are fewer records than clients.
    """
    files = len(data.files)
    if files > 1 and wanted in (None, files):
        return Clients("by-file", files, "every file is a client")
    owner = next((field for field, values in data.fields.items() if _names_owners(field, values)), None)
    if owner and wanted in (None, data.fields[owner]):
        return Clients(f"by-field:{owner}", data.fields[owner], f'every value of "{owner}" is a client')
    number = wanted or min(CLIENTS, len(data.records))
    labels = {field: values for field, values in data.fields.items() if _is_label(values, len(data.records))}
    candidates = [f"dirichlet:{SKEW}:{field}" for field in sorted(labels, key=labels.__getitem__)]
    for partition in candidates:
        try:
            partition_records(data.records, partition, number, seed=0)
        except JobError:
            continue
        field = partition.rpartition(":")[2]
        return Clients(partition, number, f'every client has its own mixture of "{field}", as real ones would')
    partition_records(data.records, "iid", number, seed=0)
    return Clients("iid", number, "the records are dealt to the clients at random")


def _names_owners(field: str, values: int) -> bool:
    return values >= FEWEST_OWNERS and any(owner in field.lower() for owner in OWNERS)


def _is_label(values: int, records: int) -> bool:
    return 2 <= values <= MOST_LABELS and records >= REPEATS * values


def propose_length(tokens: Tokens, text: bool, positions: int | None) -> int:
    """Returns a sequence length that cuts no example, or of data with a few much longer ones, at most one in twenty.

    Args:
        positions: longest sequence that the base supports; None where it is not known.
    """
    _, high, last = (tokens.lengths[place] for place in places(len(tokens.lengths)))
    needed = last if last <= 2 * high else high
    return max(16, min(_up(needed, 16), positions or LONGEST, LONGEST_TEXT if text else LONGEST))


def propose_batch(tokens: Tokens, sequence_length: int) -> int:
    """Returns the tokens of an optimizer step: some examples, and at least one sequence."""
    return max(sequence_length, min(_up(round(STEP_EXAMPLES * tokens.mean), 64), MOST_BATCH))


def _up(value: int, step: int) -> int:
    return -(-value // step) * step


def propose(
    inputs: Inputs,
    data: DataSet,
    tokens: Tokens,
    clients: Clients,
    positions: int | None = None,
    narrowest: int | None = None,
) -> str:
    """Returns a job file in which every line has a comment.

    Args:
        positions: longest sequence that the base supports; None where it is not known.
        narrowest: the smaller side of the base's narrowest linear layer; None where it is not known.
    """
    length = propose_length(tokens, data.is_text, positions)
    batch = propose_batch(tokens, length)
    steps = max(FEWEST_STEPS, min(MOST_STEPS, round(len(data.records) / clients.number * tokens.mean / batch)))
    cohort = min(COHORT, clients.number)
    counted = "tokens" if tokens.counted else f"tokens, estimated as {CHARACTERS} characters each"
    middle, high, longest = (tokens.lengths[place] for place in places(len(tokens.lengths)))
    lengths = f"to which examples are cut, in {counted}: median {middle}, 95% up to {high}, longest {longest}"
    rank = min(narrowest or CORE_RANK, CORE_RANK)
    sections = [
        _section("model", [("base", inputs.base, "the model, which stays as it is: only an adapter is trained")]),
        *([_section("adapter", [("rank", rank, "as wide as the base's narrowest layer")])] if rank < CORE_RANK else []),
        _section(
            "data",
            [
                ("train", inputs.train, f"the examples, {data.form}; paths start at this file's folder"),
                ("partition", clients.partition, f"who owns what in a simulation: {clients.comment}"),
                *([("clients", clients.number, "number of simulated clients")] if _takes_number(clients) else []),
                ("holdout", 0.1, "share of its examples that each client keeps back, to score the result on"),
                (
                    "sequence_length",
                    length,
                    lengths,
                ),
            ],
            _hints(data),
        ),
        _section(
            "training",
            [
                (
                    "local_steps",
                    steps,
                    "a client's optimizer steps in a round: about one pass over its examples, within bounds",
                ),
                ("batch_tokens", batch, "tokens of a step: more are steadier, and slower"),
            ],
            ["learning_rate follows from the base's width. A loss that rises between rounds wants a smaller one."],
        ),
        _section(
            "federation",
            [
                ("rounds", ROUNDS, "how often clients train and the server adds what they learned"),
                ("clients_per_round", cohort, f"of {clients.number}; a round takes longer with more"),
            ],
        ),
        _secure(cohort),
    ]
    head = "# Written by fedtune init; every key that is not here has its default.\n"
    return "\n".join([head, *filter(None, sections)])


def _takes_number(clients: Clients) -> bool:
    return not clients.partition.startswith("by-")


def _hints(data: DataSet) -> list[str]:
    hints = ['evaluation = "FILE" would name examples that the server scores, too; an export needs them.']
    if data.fields:
        named = ", ".join(f'"{field}" ({values} values)' for field, values in data.fields.items())
        hints.append(f'Fields of the records: {named}; partition = "by-field:NAME" makes each value a client,')
        hints.append('and balance = "NAME" lets each client train equally often on every value that it has.')
    return hints


def _secure(cohort: int) -> str | None:
    """Returns the section that turns secure aggregation off where too few clients take part for it."""
    if not secure_cohort_problems(Job(), cohort):
        return None
    fewest = next(size for size in count(cohort) if not secure_cohort_problems(Job(), size))
    return _section(
        "secure_aggregation",
        [("enabled", False, f"the server sees every update: a sum hides one from {fewest} clients a round on")],
    )


def _section(name: str, rows: Sequence[tuple[str, str | int | float, str]], hints: Sequence[str] = ()) -> str:
    keys = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value, _ in rows]
    width = max(map(len, keys))
    lines = [f"{key:{width}}  # {comment}" for key, (_, _, comment) in zip(keys, rows, strict=True)]
    return "\n".join([f"[{name}]", *lines, *(f"# {hint}" for hint in hints)]) + "\n"
