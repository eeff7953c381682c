"""How far can one client of a masked round move the adapter: an honest one, and one that sends what it likes?

Words under masks are not checked one by one, so a hostile client may contribute any words and any norm that leave the
sums in range. This program lets it know the sum of all others and the decoding, and push as far as it can towards a
goal of its own: words that bring every value of the sum to the end of its range, and a norm that opens the next clip.

    honest     distance of the mean with an honest client from the mean without it, in clips
    hostile    the same with the hostile client in its place
    unbounded  the same if the server did not shorten means (fedtune.core.codec.maskable)
    ten        distance after ten rounds of a constant learning rate, hostile over honest, the clip adapting every round

In groups each has a sum of its own, whose mean is bounded in the same way, and a rule combines the groups' means. The
hostile client knows the sum of the others of its group. Over groups the clip is the median of the groups' clips.

Honest updates have norms of 0.5 of what a round's steps can reach, as on benchmarks/real, and a common direction with
which each has the cosine SHARED.

    python benchmarks/influence/run.py        # a minute; writes its section of RESULTS.md beside this file
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from influence_results import write_section
from numpy.typing import NDArray

from fedtune.core.codec import ClipRange, MaskableCodec, RingUpdate, RoundContext
from fedtune.core.codec.clipping import LEAST_SHARE
from fedtune.core.codec.maskable import DecodedSum
from fedtune.core.codec.quantization import dequantize_sum, public_range
from fedtune.core.codec.ring import AUXILIARY_ONE
from fedtune.core.codec.rotation import unrotate
from fedtune.strategies.aggregation import CoordinateMedian, TrimmedMean
from fedtune.strategies.aggregation.robust import Rule

TITLE = "How far can one client of a masked round move the adapter?"
COUNT, BITS, ROUNDS = 67_200, 3, 10  # the small base of benchmarks/real, and the default's resolution
REACH, NORM, SHARED = 2.0, 1.0, 0.3
Vector = NDArray[np.float32]


@dataclass(frozen=True)
class PlainMean:
    """The mean, as a rule."""

    def reduce(self, updates: NDArray[np.float32], weights: NDArray[np.int64], selecting: slice) -> Vector:
        """Returns the mean."""
        del weights, selecting
        mean: Vector = updates.mean(axis=0, dtype=np.float64).astype(np.float32)
        return mean


@dataclass(frozen=True)
class Row:
    """A cohort of equal groups, and the rule over them."""

    clients: int
    groups: int = 1
    name: str = "mean"
    rule: Rule = PlainMean()

    @property
    def size(self) -> int:
        """The number of clients of a group."""
        return self.clients // self.groups


GROUPED = ((30, 5), (100, 10))
RULES: dict[str, Rule] = {"mean": PlainMean(), "median": CoordinateMedian(), "trimmed mean": TrimmedMean(0.2)}
ROWS = (
    *(Row(clients) for clients in (10, 30, 100)),
    *(Row(*cohort, name, rule) for cohort in GROUPED for name, rule in RULES.items()),
)


@dataclass(frozen=True)
class Round:
    """One round's ring, the sum of one group's clients but one, and the means and mean norms of the other groups."""

    codec: MaskableCodec
    context: RoundContext
    others: RingUpdate
    means: tuple[tuple[Vector, float], ...] = ()

    @property
    def clients(self) -> int:
        """The number of the group's clients, the one in question included."""
        return self.context.n_max

    def mean(self, last: RingUpdate | None) -> tuple[Vector, float]:
        """Returns the group's mean and mean norm, with the last client or without any."""
        if last is None:
            decoded = self.codec.decode_sum(self.others, self.clients - 1, self.context)
        else:
            decoded = self.codec.decode_sum(self.codec.add(self.others, last, self.context), self.clients, self.context)
        return decoded.update, norm_of(decoded)

    def aggregate(self, last: RingUpdate | None, rule: Rule) -> tuple[Vector, float]:
        """Returns the rule's aggregate over the groups, and the clip for the next round."""
        groups = (*self.means, self.mean(last))
        weights = np.ones(len(groups), dtype=np.int64)
        clips = [ClipRange(self.context.clip).adapt(norm).clip for _, norm in groups]
        return rule.reduce(np.stack([mean for mean, _ in groups]), weights, slice(None)), float(np.median(clips))

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


def norm_of(decoded: DecodedSum) -> float:
    """Returns the mean norm, which a sum of this codec always tells."""
    assert decoded.mean_norm is not None
    return decoded.mean_norm


def update(random: np.random.Generator, common: Vector) -> Vector:
    """Returns an honest client's update."""
    own = random.standard_normal(COUNT).astype(np.float32)
    own /= np.float32(np.linalg.norm(own))
    mixed = SHARED * common + np.sqrt(1 - SHARED**2) * own
    scaled: Vector = (NORM * mixed / np.linalg.norm(mixed)).astype(np.float32)
    return scaled


def open_round(number: int, row: Row, clip: float, common: Vector) -> Round:
    """Returns a round in which all clients but the last have sent their words."""
    codec, context = MaskableCodec(BITS), RoundContext(number, COUNT, clip, row.size)
    random = np.random.default_rng((number, row.clients))

    def summed(clients: range) -> RingUpdate:
        total = codec.zero(context)
        for client in clients:
            total = codec.add(total, codec.encode(update(random, common), client, context), context)
        return total

    last = summed(range(row.size - 1))
    means = []
    for group in range(1, row.groups):
        decoded = codec.decode_sum(summed(range(group * row.size, (group + 1) * row.size)), row.size, context)
        means.append((decoded.update, norm_of(decoded)))
    return Round(codec, context, last, tuple(means))


def measure(row: Row) -> tuple[float, float, float, float]:
    """Returns the table's figures of a row: honest, hostile, unbounded, ten."""
    random = np.random.default_rng(0)
    common = random.standard_normal(COUNT).astype(np.float32)
    common /= np.float32(np.linalg.norm(common))
    goal = random.integers(2, size=MaskableCodec(BITS).word_count(RoundContext(0, COUNT, 1.0, row.size))).astype(bool)
    clips = {"honest": 1.25 * NORM, "hostile": 1.25 * NORM}
    moved = {name: np.zeros(COUNT) for name in clips}
    first: dict[str, float] = {}
    for number in range(ROUNDS):
        for name, clip in clips.items():
            this = open_round(number, row, clip, common)
            honest = this.codec.encode(update(np.random.default_rng(number), common), row.clients, this.context)
            last = honest if name == "honest" else this.attack(goal)
            aggregate, adapted = this.aggregate(last, row.rule)
            without, _ = this.aggregate(None, row.rule)
            moved[name] += aggregate - without
            if number == 0:
                first[name] = float(np.linalg.norm(aggregate - without)) / clip
                if name == "hostile":
                    first["unbounded"] = float(np.linalg.norm(this.unbounded(last) - without)) / clip
            clips[name] = min(max(adapted, LEAST_SHARE * REACH), REACH)
    ten = float(np.linalg.norm(moved["hostile"]) / np.linalg.norm(moved["honest"]))
    return first["honest"], first["hostile"], first["unbounded"], ten


def table(rows: Sequence[tuple[Row, tuple[float, float, float, float]]]) -> str:
    """Returns the table in Markdown; the mean without bound is shown for one group."""
    titles = "| clients | groups | rule | honest | hostile | times | unbounded | times | ten rounds, times |"
    lines = [titles, "|" + " --- |" * 9]
    for row, (honest, hostile, unbounded, ten) in rows:
        free = f"{unbounded:.2f} | {unbounded / honest:.1f}" if row.groups == 1 else " | "
        lines.append(
            f"| {row.clients} | {row.groups} | {row.name} | {honest:.3f} | {hostile:.2f} | {hostile / honest:.1f} | "
            f"{free} | {ten:.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    measured = table([(row, measure(row)) for row in ROWS])
    print(measured)
    write_section(TITLE, f"{measured}\n\n{(__doc__ or '').strip()}")
