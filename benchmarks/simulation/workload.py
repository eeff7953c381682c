"""What every contestant of this benchmark is given, so that only the way of simulating differs."""

from __future__ import annotations

from dataclasses import dataclass

SEED = 0
RANK = 16
ALPHA = 32.0
LEARNING_RATE = 2e-3
EXAMPLES_PER_CLIENT = 200
BATCH_EXAMPLES = 16  # the peer counts a batch in examples
BATCH_TOKENS = 640  # fedtune in tokens, padding included: 16.0 of the demo's examples on average


@dataclass(frozen=True)
class Workload:
    """A federation to simulate.

    Args:
        clients: the population.
        cohort: clients a round.
        rounds: how many; the first one is not measured, it pays for the start.
        local_steps: optimizer steps a client takes in a round.
    """

    clients: int
    cohort: int
    rounds: int
    local_steps: int
