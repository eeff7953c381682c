"""The lengths of a data set's examples in tokens, and the effect of a job's sequence length on them.

    lengths = Lengths.of(population, tokenizer, sequence_length=256)
    lengths.median, lengths.longest, lengths.cleaning.truncated

Of a large data set every so-many-th record is measured, so that a look at it takes seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedtune.data.examples import CleaningReport, prepare
from fedtune.data.population import Population
from fedtune.data.records import Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_MEASURED = 5000  # records of which lengths are measured
HIGH = 0.95  # share of the examples that `Lengths.high` bounds
_UNCUT = 1 << 30  # a sequence length that cuts nothing


@dataclass(frozen=True)
class Lengths:
    """The lengths of uncut examples in tokens, and what becomes of their records at a sequence length.

    Args:
        measured: number of records whose lengths these are, out of `records`.
        median, high, longest: tokens; `high` is the length that 95% of the examples do not exceed.
        cleaning: counts of the measured records at the sequence length.
        unusable: names of the clients that have no usable example among them.
    """

    measured: int
    records: int
    median: int
    high: int
    longest: int
    cleaning: CleaningReport
    unusable: tuple[str, ...]

    @classmethod
    def of(cls, population: Population, tokenizer: PreTrainedTokenizerBase, sequence_length: int) -> Lengths:
        """Measures the records of a population, each client's by itself, as its device would clean them.

        Raises:
            ModelError: the tokenizer cannot render the records.
        """
        clients = {name: population.records(name) for name in population.names}
        records = sum(map(len, clients.values()))
        step = -(-records // MOST_MEASURED)
        reports = {name: prepare(own[::step], tokenizer, sequence_length)[1] for name, own in clients.items()}
        lengths = sorted(length for own in clients.values() for length in token_lengths(own[::step], tokenizer))
        middle, high, longest = (lengths[place] if lengths else 0 for place in places(len(lengths)))
        cleaning = sum(reports.values(), CleaningReport())
        unusable = tuple(name for name, report in reports.items() if not report.kept)
        return cls(cleaning.read, records, middle, high, longest, cleaning, unusable)


def token_lengths(records: Sequence[Record], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the number of tokens of each usable record, uncut.

    Raises:
        ModelError: the tokenizer cannot render the records.
    """
    return [len(example.ids) for example in prepare(records, tokenizer, _UNCUT)[0]]


def places(count: int) -> tuple[int, int, int]:
    """Returns the places of the median, of the 95% quantile and of the largest among so many ascending values."""
    return count // 2, min(int(HIGH * count), count - 1), count - 1
