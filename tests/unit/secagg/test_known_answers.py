"""The whole protocol against recorded bytes, with which other implementations and later versions can be compared.

`known_answers.json` holds the primitives on small inputs and every message of one round of four clients, the last of
which shares its secrets and then vanishes. Secrets come from `Stream`, so that a reader can follow each one.

    PYTHONPATH=tests/helpers python tests/unit/secagg/test_known_answers.py    # records them again

Record again only after a deliberate change of the protocol.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rehearsal import LENIENT, Rehearsal, Update, enrol

from fedtune.core.secagg import (
    Assumptions,
    ClientSession,
    Member,
    MemoryRoundLog,
    RoundMark,
    Segment,
    ServerSession,
    Stage,
    Subject,
    round_config,
)
from fedtune.core.secagg.graph import Graph
from fedtune.core.secagg.masking import add_masks, word_type
from fedtune.core.secagg.primitives import Agreement, derive, digest, framed, seal
from fedtune.core.secagg.shamir import split

PATH = Path(__file__).with_name("known_answers.json")
SEGMENTS = (Segment("v", 3, 7, 15, (0,)), Segment("weight", 1, 32, 1000, (0,)))
UPDATES: dict[str, Update] = {
    f"client-{i}": {"v": np.array([i, 15, 5 * i], np.uint32), "weight": np.array([100 + i], np.uint32)}
    for i in range(4)
}


class Stream:
    """A source of the bytes SHA-256(name ‖ 0) ‖ SHA-256(name ‖ 1) ‖ ..., with the count as 8 big-endian bytes."""

    def __init__(self, name: str) -> None:
        self._name, self._count, self._ready = name.encode(), 0, b""

    def __call__(self, size: int) -> bytes:
        while len(self._ready) < size:
            self._ready += hashlib.sha256(self._name + self._count.to_bytes(8, "big")).digest()
            self._count += 1
        drawn, self._ready = self._ready[:size], self._ready[size:]
        return drawn


@pytest.fixture(scope="module")
def recorded() -> Any:
    return json.loads(PATH.read_text(encoding="utf-8"))


def test_primitives_give_the_recorded_answers(recorded: Any) -> None:
    assert primitives() == recorded["primitives"]


def test_a_round_gives_the_recorded_messages_and_the_recorded_sum(recorded: Any) -> None:
    assert one_round() == recorded["round"]


def test_the_recorded_sum_is_the_sum_of_the_survivors(recorded: Any) -> None:
    assert recorded["round"]["result"]["survivors"] == ["client-0", "client-1", "client-2"]
    for name, words in recorded["round"]["result"]["sums"].items():
        survivors = [UPDATES[f"client-{i}"][name] for i in range(3)]
        assert words == np.sum(survivors, axis=0).tolist()


def primitives() -> dict[str, Any]:
    key = bytes(range(32))
    streams = {}
    for bits in (8, 16, 32, 62):
        words = np.zeros(4, word_type(bits))
        add_masks(words, [key])
        streams[f"{words.dtype.itemsize * 8}-bit words"] = words.tolist()
    return {
        "framed('label', b'\\x01\\x02', 3)": framed("label", b"\x01\x02", 3).hex(),
        "digest('label', b'\\x01\\x02', 3)": digest("label", b"\x01\x02", 3).hex(),
        "derive(00..1f, b'salt', 'label', 1)": derive(key, b"salt", "label", 1).hex(),
        "X25519 public key of 00..1f": Agreement(key).public.hex(),
        "seal(00..1f, b'shares', b'associated')": seal(key, b"shares", b"associated").hex(),
        "PRG(00..1f)": streams,
        "split(7, threshold 3, points 1..5, Stream('shamir'))": [
            share.to_bytes(32, "big").hex() for share in split(7, 3, range(1, 6), Stream("shamir"))
        ],
        "neighbours of 0 among 0..9, degree 4, seed 'seed'": sorted(Graph(range(10), 4, b"seed").neighbours(0)),
    }


def one_round() -> dict[str, Any]:
    names = list(UPDATES)
    identities, roster = enrol(names, Stream("identities"))
    config = round_config(
        Subject("known answers", RoundMark(1, 0), "0" * 64, "1" * 64, b"codec"),
        [Member(name, 0) for name in names],
        SEGMENTS,
        Assumptions(0.1, 0.3),
        Stream("server"),
    )
    clients = {n: ClientSession(n, identities[n], roster, LENIENT, MemoryRoundLog(), Stream(n)) for n in names}
    rehearsal = Rehearsal(ServerSession(config, roster), clients)
    exchanges = []
    requests = rehearsal.server.open()
    while requests:
        stage = rehearsal.server.stage
        if stage is Stage.MASK:
            requests.pop("client-3")
        answers = {name: rehearsal.answer(name, request, UPDATES) for name, request in requests.items()}
        exchanges.append(
            {
                "exchange": stage.value,
                "requests": {name: request.hex() for name, request in requests.items()},
                "answers": {name: answer.hex() for name, answer in answers.items()},
            }
        )
        for name, answer in answers.items():
            rehearsal.server.receive(name, answer)
        requests = rehearsal.server.advance()
    result = rehearsal.server.result
    return {
        "identities": {name: identity.public.hex() for name, identity in identities.items()},
        "updates": {name: {s: words.tolist() for s, words in update.items()} for name, update in UPDATES.items()},
        "exchanges": exchanges,
        "result": {
            "survivors": list(result.survivors),
            "sums": {name: words.tolist() for name, words in result.sums.items()},
        },
    }


if __name__ == "__main__":
    answers = {"primitives": primitives(), "round": one_round()}
    PATH.write_text(json.dumps(answers, indent=1) + "\n", encoding="utf-8")
