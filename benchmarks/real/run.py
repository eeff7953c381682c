"""How few bytes reach the exact match of float32 FedAvg on a real language model, with clients that are part-time?

Rows are what is trained and sent, at a participation, on a base model:

    participation   share of the clients in a round: 1.0, 0.5, 0.1, or once, where every client takes part in one round
    float32         FedAvg of A and B of rank 16, 4 bytes a number in both directions; the other rows compare with it
    secure, clear   the product's default with secure aggregation and without
    core            the default's adapter, a square matrix between fixed factors (R alone), in float32
    float32-muon    A and B in float32, by the default's optimizer: what part of its gain is the optimizer's?
    lora-secure     A and B of rank 16 as the default sends them
    first-clear     the first edition's default in the clear: rank 16, the largest values, error feedback
    ffa             B alone, in float32
    centralised     one trainer on all clients' records, with as many steps as all of a round's clients together
    alone           one client on its own records, with its share of those steps

Bytes are all payload bytes of a run by its own ledger, in both directions, secure aggregation's messages included: a
client that comes back after many rounds pays for the adapter that it missed.

    python examples/real-model/wordnet.py TASK --train 24000 --eval 2500 --validation 1000 --form prompt
    python benchmarks/real/small_base.py BASE
    python benchmarks/real/run.py --small BASE TASK                         # everything, some hours on two cores
    python benchmarks/real/run.py --small BASE TASK --smollm2 BASE TASK --only small/secure small/clear
    python benchmarks/real/run.py --small BASE TASK --budget-minutes 60     # the same command goes on later
    python benchmarks/real/run.py --dry                                     # table and plot from the results

A finished run is one line of the results and is never repeated while its job, base model and data stay the same; an
interrupted one goes on after its last whole round.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from book import Book, next_of
from measure import TEST, TimeIsUpError, measure
from real_results import publish
from rows import SCENES, Place, Row, planned

from fedtune.core.errors import FedtuneError, InputError
from fedtune.core.job.settings import ModelSettings
from fedtune.model.base_model import load_base

HERE = Path(__file__).parent
FILES = ("train.jsonl", "validation.jsonl", TEST)


def main() -> int:
    options = _arguments()
    deadline = time.monotonic() + 60 * options.budget_minutes if options.budget_minutes else None
    try:
        places = {name: Place(*map(Path, given)) for name in SCENES if (given := getattr(options, name))}
        book = Book.open(options.results, {name: digests(place) for name, place in places.items()})
        rows = [row for row in planned() if row.scene.name in places and _wanted(row, options.only)]
        if not options.dry:
            work(book, rows, places, options.runs, deadline)
    except FedtuneError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    publish(book, [row for row in planned() if row.scene.name in book.inputs])
    return 0


def work(book: Book, rows: Sequence[Row], places: Mapping[str, Place], runs: Path, deadline: float | None) -> None:
    """Measures all runs that are missing, until the deadline. A row that this version does not permit is left out."""
    left = list(rows)
    while (run := next_of(book, left)) is not None:
        print(run.name, flush=True)
        try:
            outcome = measure(run, places[run.row.scene.name], runs / run.name, deadline)
        except TimeIsUpError:
            print("\nthe time is up; the same command goes on with the next round")
            return
        except InputError as error:
            print(f"  not permitted here: {error}", flush=True)
            left.remove(run.row)
            continue
        book.add(run, outcome)
        moved = (outcome["bytes"]["up"] + outcome["bytes"]["down"]) / 1e6
        print(f"  {outcome['exact_match']:.1%} of {outcome['examples']:,} examples, {moved:.2f} MB", flush=True)
        if deadline is not None and time.monotonic() > deadline:
            print("the time is up; the same command goes on with the next run")
            return


def digests(place: Place) -> dict[str, str]:
    """Returns the digests of a base model and of the task's files.

    Raises:
        InputError: a file is missing, or the base is no model.
    """
    found = hashlib.sha256()
    for name in FILES:
        path = place.task / name
        if not path.is_file():
            raise InputError(f"{path}: missing; write the task with examples/real-model/wordnet.py --validation 1000")
        found.update(path.read_bytes())
    return {"base": load_base(ModelSettings(base=str(place.base))).digest, "task": found.hexdigest()}


def _wanted(row: Row, only: Sequence[str]) -> bool:
    return not only or any(row.name.startswith(prefix) for prefix in only)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in SCENES:
        parser.add_argument(f"--{name}", nargs=2, metavar=("BASE", "TASK"), help="a base model, and the task's folder")
    parser.add_argument("--only", nargs="+", default=[], metavar="PREFIX", help="rows such as small/secure/0.1")
    parser.add_argument("--budget-minutes", type=float, metavar="N", help="stop after a round once they are over")
    parser.add_argument("--runs", type=Path, default=Path("runs/real"), help="where run directories are kept")
    parser.add_argument("--results", type=Path, default=HERE / "results.jsonl", help="the finished runs")
    parser.add_argument("--dry", action="store_true", help="run nothing; write table and plot from the results")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
