"""How many states does the model have, and does every promise hold in all of them?

PYTHONPATH=tests/model python -m secagg_model            # the bounds of the fast tests, as a Markdown table
PYTHONPATH=tests/model python -m secagg_model --slow     # and the larger ones
PYTHONPATH=tests/model python -m secagg_model --mutants  # and a trace for each mutant
"""

from __future__ import annotations

import argparse
import time

from secagg_model.scenarios import FAST, MUTANTS, SLOW
from secagg_model.search import search


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slow", action="store_true", help="the larger bounds too")
    parser.add_argument("--mutants", action="store_true", help="print the trace of each mutant")
    options = parser.parse_args()
    print("| bound | states | transitions | with an opened sum | broken | seconds |\n|---|---|---|---|---|---|")
    states, wrong = 0, False
    for scenario in (*FAST, *(SLOW if options.slow else ())):
        begun = time.perf_counter()
        result = search(scenario)
        states, wrong = states + result.states, wrong or bool(result.broken)
        seconds = f"{time.perf_counter() - begun:.0f}"
        figures = f"{result.states:,} | {result.transitions:,} | {result.opened:,}"
        print(
            f"| {scenario.name} | {figures} | {', '.join(result.broken) or 'none'} | {seconds} |",
            flush=True,
        )
    print(f"\n{states:,} states in all.")
    if options.mutants:
        for mutant in MUTANTS:
            result = search(mutant.scenario, mutant.rules)
            print(f"\n{mutant.name}: {', '.join(result.broken) or 'nothing breaks'}")
            for number, message in result.trace:
                print(f"  device {number}: {message}")
    return int(wrong)


if __name__ == "__main__":
    raise SystemExit(main())
