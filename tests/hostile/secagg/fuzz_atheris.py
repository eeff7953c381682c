"""Coverage-guided fuzzing of both sides' message handlers; optional, since atheris is not among the dependencies.

    pip install atheris
    python tests/hostile/secagg/fuzz_atheris.py -max_total_time=300

Each input chooses an exchange, a side, and the bytes that arrive there in place of the honest ones. Any error but a
PeerError is a finding, and so is a round that then gives a wrong sum.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

import atheris  # type: ignore[import-not-found, import-untyped, unused-ignore]

sys.path.insert(0, str(Path(__file__).parents[2] / "federation"))

with atheris.instrument_imports(include=["fedtune"]):
    from secure_fixture import Fixture

    from fedtune.core.errors import PeerError

NAMES = [f"client-{index}" for index in range(5)]
VICTIM = NAMES[0]
HONEST = Fixture(NAMES)
HONEST.run()


def one_input(data: bytes) -> None:
    provider: Any = atheris.FuzzedDataProvider(data)
    stage, to_client = provider.ConsumeIntInRange(0, 4), provider.ConsumeBool()
    noise = provider.ConsumeBytes(provider.remaining_bytes())
    fixture = Fixture(NAMES)
    round_ = fixture.open()
    for reached, exchange in enumerate(round_.exchanges()):
        for name in exchange.requests:
            if reached == stage and name == VICTIM:
                if to_client:
                    with contextlib.suppress(PeerError):
                        deliver(fixture.rounds, stage, noise, exchange.requests[VICTIM][-1])
                else:
                    round_.take_in(name, noise)
                    continue
            try:
                round_.take_in(name, fixture.answer(name, exchange))
            except PeerError as error:
                round_.give_up(name, str(error))
    fixture.state, record = round_.close()
    if len(record.survivors) == len(NAMES) and record.aborted is None:
        assert fixture.digest == HONEST.digest, "every update is in the sum, and the sum is another"


def deliver(rounds: Any, stage: int, noise: bytes, request: bytes) -> None:
    """Gives noise to the client in place of an exchange's message."""
    if stage == 0:
        rounds.open(VICTIM, noise, request)
    else:
        (rounds.share, rounds.train, rounds.vote, rounds.unmask)[stage - 1](VICTIM, noise)


def main() -> None:
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
