"""How far is the decoded mean of real updates from the true one, and what does it cost, by form and bits?

Ten clients of a job train one round after the other from the exact mean, and in two rounds their updates are encoded in
every form. The error is ‖decoded mean - mean‖² / ‖mean‖², of one round, and of the average over eight rounds in which
the same updates come again: what is left there is bias, which no number of rounds averages out. "Nearest" is the dense
form without its dither, "sparse" has no error feedback. Cohorts of a hundred are ten times the same ten updates.

    python benchmarks/compression/mean_error.py [JOB.toml]      # the demo by default: a minute of one core
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
from tables import publish

from fedtune.client.client_store import ClientStore
from fedtune.client.device import Device
from fedtune.core.codec import DenseCodec, ExactCodec, MaskableCodec, RingUpdate, RoundContext, SparseCodec
from fedtune.core.codec.clipping import HEADROOM
from fedtune.core.codec.entropy import encode_levels
from fedtune.core.codec.quantization import nearest_levels
from fedtune.core.codec.sparse import root_mean_square_step
from fedtune.core.job.job_file import load_job
from fedtune.core.protocol.messages import TrainRequest, decode, encode
from fedtune.server.simulation.simulation_context import SimulationContext
from fedtune.strategies.assembly import assemble
from fedtune.strategies.broadcast import Broadcast
from fedtune.strategies.federation import initial_state
from fedtune.strategies.round import TrainingRound

JOB = Path(__file__).parent.parent / "demo" / "job.toml"
EXACT = ("secure_aggregation.enabled=false", "compression.preset=none", "data.evaluation=", "export.formats=[]")
ROUNDS = (1, 8)  # Adam's first steps are of equal size, later ones are not
COHORTS = (10, 100)
REPEATS = 8

Coder = Callable[[list[np.ndarray], int], tuple[np.ndarray, float]]
"""Maps updates and a seed to their decoded mean and the bits that a value of a client took."""


def main() -> None:
    job = Path(sys.argv[1]) if len(sys.argv) > 1 else JOB
    rows = []
    for number, updates in real_updates(job):
        for cohort in COHORTS:
            sent = updates * (cohort // len(updates))
            for name, coder in CODERS.items():
                rows.append([f"{number}", f"{cohort}", name, *measured(sent, coder)])
    publish(
        __file__,
        "How far is the decoded mean of real updates from the true one, and what does it cost, by form and bits?",
        ["round", "clients", "form", "bits a value", "error of a round", "error of the average of 8"],
        rows,
        [f"Updates of the adapter's last factor (B, or R of a core) in {job.parent.name}/{job.name}."],
    )


def real_updates(path: Path) -> Iterator[tuple[int, list[np.ndarray]]]:
    """Yields the numbers of some rounds, and the ten clients' updates of the last factor in them."""
    job = load_job(path, [*EXACT, "federation.clients_per_round=10"])
    with tempfile.TemporaryDirectory() as folder:
        context = SimulationContext.begin(job, Path(folder))
        device = Device(lambda _: context.trainer, context.examples, ClientStore(Path(folder)))
        layout, federation = context.model.layout, assemble(job, context.base, context.model.layout)
        broadcast, state = Broadcast(layout, initial_state(federation).adapter, bits=None), initial_state(federation)
        for number in range(1, max(ROUNDS) + 1):
            round_ = TrainingRound.open(federation, state, list(context.population.names), broadcast)
            next(round_.exchanges())
            updates = []
            for name in round_.cohort:
                reply = device.train(name, decode(round_.requests.payload(name), TrainRequest))
                updates.append(ExactCodec().decode(reply.update[-1], round_.plan.terms[-1].count))
                round_.take_in(name, encode(reply))
            if number in ROUNDS:
                yield number, updates
            state, _ = round_.close()


def measured(updates: list[np.ndarray], coder: Coder) -> list[str]:
    truth = np.asarray(np.mean(updates, axis=0, dtype=np.float64))
    decoded, errors, bits = np.zeros_like(truth), [], 0.0
    for seed in range(REPEATS):
        mean, bits = coder(updates, seed)
        decoded += mean / REPEATS
        errors.append(relative(mean, truth))
    return [f"{bits:.2f}", f"{np.mean(errors):.1e}", f"{relative(decoded, truth):.1e}"]


def relative(decoded: np.ndarray, truth: np.ndarray) -> float:
    return float(np.square(decoded - truth).sum() / np.square(truth).sum())


def in_a_ring(bits: int) -> Coder:
    """Returns the coder of words in a ring, with the clip to which these norms lead."""

    def code(updates: list[np.ndarray], seed: int) -> tuple[np.ndarray, float]:
        codec, count = MaskableCodec(bits), updates[0].size
        clip = HEADROOM * float(np.mean([np.linalg.norm(update) for update in updates]))
        context = RoundContext(seed, count, clip, len(updates))
        total: RingUpdate = codec.zero(context)
        for client, update in enumerate(updates):
            total = codec.add(total, codec.encode(update, client + 1000 * seed, context), context)
        mean = codec.decode_sum(total, len(updates), context).update
        return mean, codec.ring(context).width * codec.word_count(context) / count

    return code


def one_by_one(encode_one: Callable[[np.ndarray, int], tuple[np.ndarray, int]]) -> Coder:
    """Returns the coder that encodes updates one by one: (update, seed) -> (decoded, bytes)."""

    def code(updates: list[np.ndarray], seed: int) -> tuple[np.ndarray, float]:
        sent = [encode_one(update, client + 1000 * seed) for client, update in enumerate(updates)]
        return np.mean([each for each, _ in sent], axis=0), 8 * float(np.mean([size for _, size in sent])) / sent[0][
            0
        ].size

    return code


def dense(bits: int) -> Coder:
    def encode_one(update: np.ndarray, seed: int) -> tuple[np.ndarray, int]:
        data = DenseCodec(bits).encode(update, seed)
        return DenseCodec(bits).decode(data, update.size), len(data)

    return one_by_one(encode_one)


def nearest(bits: int) -> Coder:
    def encode_one(update: np.ndarray, seed: int) -> tuple[np.ndarray, int]:
        del seed
        step = root_mean_square_step(update, bits)
        levels = nearest_levels(update, step)
        return levels * step, len(encode_levels(levels))

    return one_by_one(encode_one)


def sparse(bits: int, density: float) -> Coder:
    def encode_one(update: np.ndarray, seed: int) -> tuple[np.ndarray, int]:
        del seed
        data = SparseCodec(density, bits).encode(update)
        return SparseCodec(density, bits).decode(data, update.size), len(data)

    return one_by_one(encode_one)


CODERS: Mapping[str, Coder] = {
    **{f"ring, {bits} bits": in_a_ring(bits) for bits in (1, 2, 3, 4)},
    **{f"dense, {bits} bits": dense(bits) for bits in (2, 3, 4)},
    **{f"nearest, {bits} bits": nearest(bits) for bits in (2, 3)},
    "sparse, 3 bits, a tenth": sparse(3, 0.1),
}


if __name__ == "__main__":
    main()
