"""How far can one client of a masked round move the adapter: an honest one, and one that sends what it likes?

Words under masks are not checked one by one, so a hostile client may contribute any words and any norm that leave the
sums in range. This program lets it know the sum of all others and the decoding, and push as far as it can towards a
goal of its own: words that bring every value of the sum to the end of its range, and a norm that opens the next clip.

    honest     distance of the mean with an honest client from the mean without it, in clips
    hostile    the same with the hostile client in its place
    unbounded  the same if the server did not shorten means (fedtune.core.codec.maskable)
    ten        distance after ten rounds of a constant learning rate, hostile over honest, the clip adapting every round

Honest updates have norms of 0.5 of what a round's steps can reach, as on benchmarks/real, and a common direction with
which each has the cosine SHARED.

    python benchmarks/influence/run.py        # seconds; writes RESULTS.md beside this file
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedtune.core.codec import ClipRange, MaskableCodec, RingUpdate, RoundContext
from fedtune.core.codec.clipping import LEAST_SHARE
from fedtune.core.codec.quantization import dequantize_sum, public_range
from fedtune.core.codec.ring import AUXILIARY_ONE
from fedtune.core.codec.rotation import unrotate

HERE = Path(__file__).parent
COUNT, BITS, ROUNDS = 67_200, 3, 10  # the small base of benchmarks/real, and the default's resolution
REACH, NORM, SHARED = 2.0, 1.0, 0.3
CLIENTS = (10, 30, 100)
Vector = NDArray[np.float32]


@dataclass(frozen=True)
class Round:
    """One round's ring and the sum of all clients but one."""

    codec: MaskableCodec
    context: RoundContext
    others: RingUpdate

    @property
    def clients(self) -> int:
        """The number of clients, the one in question included."""
        return self.context.n_max

    def mean(self, last: RingUpdate | None) -> tuple[Vector, float]:
        """Returns the mean and the mean norm, with the last client or without any."""
        if last is None:
            decoded = self.codec.decode_sum(self.others, self.clients - 1, self.context)
        else:
            decoded = self.codec.decode_sum(self.codec.add(self.others, last, self.context), self.clients, self.context)
        return decoded.update, decoded.mean_norm

    def unbounded(self, last: RingUpdate) -> Vector:
        """Returns the mean as the words say it, however long it is."""
        total = self.codec.add(self.others, last, self.context)
        levels = self.codec.ring(self.context).levels
        bound = public_range(self.context.clip, total.words.size, levels, self.clients)
        values = dequantize_sum(total.words, bound, levels, self.clients) / np.float32(self.clients)
        return unrotate(values, self.context.count, self.context.seed)

    def attack(self, goal: NDArray[np.bool_]) -> RingUpdate:
        """Returns the words that bring the sum to the ends of its range, up where `goal` is true, and the most norm."""
        ring = self.codec.ring(self.context)
        ends = np.where(goal, self.clients * ring.levels, 0).astype(np.int64)
        words = ((ends - self.others.words.astype(np.int64)) % (1 << ring.width)).astype(np.uint32)
        norm = np.uint32(self.clients * AUXILIARY_ONE) - self.others.auxiliary
        return RingUpdate(words, norm)


def update(random: np.random.Generator, common: Vector) -> Vector:
    """Returns an honest client's update."""
    own = random.standard_normal(COUNT).astype(np.float32)
    own /= np.float32(np.linalg.norm(own))
    mixed = SHARED * common + np.sqrt(1 - SHARED**2) * own
    return (NORM * mixed / np.linalg.norm(mixed)).astype(np.float32)


def open_round(number: int, clients: int, clip: float, common: Vector) -> Round:
    """Returns a round in which all clients but the last have sent their words."""
    codec, context = MaskableCodec(BITS), RoundContext(number, COUNT, clip, clients)
    random = np.random.default_rng((number, clients))
    others = codec.zero(context)
    for client in range(clients - 1):
        others = codec.add(others, codec.encode(update(random, common), client, context), context)
    return Round(codec, context, others)


def measure(clients: int) -> tuple[float, float, float, float]:
    """Returns the table's figures for a number of clients: honest, hostile, unbounded, ten."""
    random = np.random.default_rng(0)
    common = random.standard_normal(COUNT).astype(np.float32)
    common /= np.float32(np.linalg.norm(common))
    goal = random.integers(2, size=MaskableCodec(BITS).word_count(RoundContext(0, COUNT, 1.0, clients))).astype(bool)
    clips = {"honest": 1.25 * NORM, "hostile": 1.25 * NORM}
    moved = {name: np.zeros(COUNT) for name in clips}
    first: dict[str, float] = {}
    for number in range(ROUNDS):
        for name, clip in clips.items():
            this = open_round(number, clients, clip, common)
            honest = this.codec.encode(update(np.random.default_rng(number), common), clients, this.context)
            last = honest if name == "honest" else this.attack(goal)
            mean, norm = this.mean(last)
            without, _ = this.mean(None)
            moved[name] += mean - without
            if number == 0:
                first[name] = float(np.linalg.norm(mean - without)) / clip
                if name == "hostile":
                    first["unbounded"] = float(np.linalg.norm(this.unbounded(last) - without)) / clip
            clips[name] = min(max(ClipRange(clip).adapt(norm).clip, LEAST_SHARE * REACH), REACH)
    ten = float(np.linalg.norm(moved["hostile"]) / np.linalg.norm(moved["honest"]))
    return first["honest"], first["hostile"], first["unbounded"], ten


def table(rows: Sequence[tuple[int, tuple[float, float, float, float]]]) -> str:
    """Returns the table in Markdown."""
    lines = ["| clients | honest | hostile | times | unbounded | times | ten rounds, times |", "|" + " --- |" * 7]
    for clients, (honest, hostile, unbounded, ten) in rows:
        lines.append(
            f"| {clients} | {honest:.3f} | {hostile:.2f} | {hostile / honest:.1f} | {unbounded:.2f} | "
            f"{unbounded / honest:.1f} | {ten:.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    measured = table([(clients, measure(clients)) for clients in CLIENTS])
    print(measured)
    title = "# How far can one client of a masked round move the adapter?"
    (HERE / "RESULTS.md").write_text(f"{title}\n\n{measured}\n\n{(__doc__ or '').strip()}\n", encoding="utf-8")
