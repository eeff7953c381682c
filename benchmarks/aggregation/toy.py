"""Which way to combine adapters of mixed rank comes closest to a known answer, and how much does each part contribute?

Clients fit a linear map in 48 dimensions: W* of rank 8, the same for all, plus a dense one of their own with half its
norm; the clients' own maps add up to zero. Each client's inputs have their own anisotropic covariance. Six clients
train 16 rank indices, seven 8 and seven 4 (or all 16, in the second table). The error is ‖B·A - W*‖²/‖W*‖² after some
rounds. This reference is plain numpy and shares no code with fedtune.

    python benchmarks/aggregation/toy.py              # under two minutes on one core
"""

from __future__ import annotations

import argparse
import copy
import datetime
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
DIMENSION, TARGET_RANK, RANK, CLIENTS = 48, 8, 16, 20
ROUNDS, EARLY, LOCAL_STEPS = 60, 10, 10
LEARNING_RATE = 0.03
OWN = 0.5  # norm of a client's own part over that of W*
MIXED = [16] * 6 + [8] * 7 + [4] * 7
SEEDS = (0, 1, 2)
REBALANCE_EVERY = 2


@dataclass(frozen=True)
class Method:
    """A way to train clients and combine their updates.

    Args:
        alternate: B in odd rounds, A in even ones; otherwise both at once.
        frozen_a: A is never trained.
        divide: an index's sum is divided by its "owners" or by the whole "cohort", which is zero-padding.
        frozen_rest: a client sees the whole adapter and trains its part; otherwise it sees only its part.
        permuted: the indices that a tier owns change from round to round; otherwise it owns the first ones.
        products: average B·A and truncate it by an SVD.
        rebalance: change the basis every REBALANCE_EVERY rounds.
        bits: bits of an update's values, with error feedback; None for exact values.
    """

    alternate: bool = False
    frozen_a: bool = False
    divide: str = "owners"
    frozen_rest: bool = False
    permuted: bool = False
    products: bool = False
    rebalance: bool = False
    bits: int | None = None


NESTED = Method(alternate=True)
WHOLE = replace(NESTED, frozen_rest=True, permuted=True)
METHODS = {
    "zero-padding (fedavg, divided by the cohort)": Method(divide="cohort"),
    "ffa": Method(frozen_a=True, frozen_rest=True, permuted=True),
    "flexlora": Method(products=True),
    "flexlora + frozen rest + permuted tiers": Method(products=True, frozen_rest=True, permuted=True),
    "fedavg, divided by owners": Method(),
    "fedavg + frozen rest + permuted tiers": Method(frozen_rest=True, permuted=True),
    "alternating, nested prefixes": NESTED,
    "alternating + frozen rest + permuted tiers": WHOLE,
    "… + rebalancing": replace(WHOLE, rebalance=True),
    "… + 4-bit updates": replace(WHOLE, rebalance=True, bits=4),
}


class Task:
    """The clients' targets and inputs."""

    def __init__(self, seed: int) -> None:
        random = np.random.default_rng([seed, 0])
        self.target = random.normal(size=(DIMENSION, TARGET_RANK)) @ random.normal(size=(TARGET_RANK, DIMENSION))
        self.target /= np.linalg.norm(self.target) / TARGET_RANK**0.5
        own = random.normal(size=(CLIENTS, DIMENSION, DIMENSION))
        own -= own.mean(axis=0)
        own *= OWN * np.linalg.norm(self.target) / np.linalg.norm(own, axis=(1, 2))[:, None, None].mean()
        self.targets = list(self.target + own)
        scales = np.logspace(0, -1, DIMENSION)
        covariances = []
        for _ in range(CLIENTS):
            basis, _ = np.linalg.qr(random.normal(size=(DIMENSION, DIMENSION)))
            covariances.append((basis * scales) @ basis.T)
        self.covariances = covariances

    def error(self, lora_a: np.ndarray, lora_b: np.ndarray) -> float:
        return float(np.square(lora_b @ lora_a - self.target).sum() / np.square(self.target).sum())


def train(
    task: Task, client: int, lora_a: np.ndarray, lora_b: np.ndarray, move: str, rate: float
) -> tuple[np.ndarray, np.ndarray]:
    """Trains with a new Adam optimizer on ½·E‖(B·A - W*)x‖², as a client does in every round; returns the update."""
    now = {"a": lora_a.copy(), "b": lora_b.copy()}
    moments = {letter: (np.zeros_like(now[letter]), np.zeros_like(now[letter])) for letter in move}
    for step in range(1, LOCAL_STEPS + 1):
        error = (now["b"] @ now["a"] - task.targets[client]) @ task.covariances[client]
        gradients = {"a": now["b"].T @ error, "b": error @ now["a"].T}
        for letter in move:
            first, second = moments[letter]
            first += 0.1 * (gradients[letter] - first)
            second += 0.001 * (np.square(gradients[letter]) - second)
            now[letter] -= rate * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
    return now["a"] - lora_a, now["b"] - lora_b


def run(method: Method, tiers: list[int], seed: int) -> tuple[float, float]:
    """Returns the error after EARLY rounds and after all."""
    task = Task(seed)
    random = np.random.default_rng([seed, 1])
    lora_a = random.uniform(-1, 1, (RANK, DIMENSION)) / DIMENSION**0.5
    lora_b = np.zeros((DIMENSION, RANK))
    residuals = [{"a": np.zeros_like(lora_a), "b": np.zeros_like(lora_b)} for _ in tiers]
    early = float("nan")
    for number in range(1, ROUNDS + 1):
        order = random.permutation(RANK) if method.permuted else np.arange(RANK)
        move = "b" if method.frozen_a else ("ba"[(number - 1) % 2] if method.alternate else "ab")
        rate = LEARNING_RATE * (1 - (number - 1) / ROUNDS)
        sums = {"a": np.zeros_like(lora_a), "b": np.zeros_like(lora_b)}
        owners = np.zeros(RANK)
        product = np.zeros((DIMENSION, DIMENSION))
        for client, tier in enumerate(tiers):
            owned = np.sort(order[:tier])
            delta_a, delta_b = _train_part(method, task, client, lora_a, lora_b, owned, move, rate)
            product += (lora_b + delta_b) @ (lora_a + delta_a) / len(tiers)
            if not method.frozen_rest and method.products:  # parts that a client does not see are not in its product
                product -= (lora_b @ lora_a - lora_b[:, owned] @ lora_a[owned]) / len(tiers)
            for letter, delta in (("a", delta_a), ("b", delta_b)):
                if letter in move:
                    sums[letter] += _sent(method, delta, letter, owned, residuals[client], random)
            owners[owned] += 1
        if method.products:
            lora_a, lora_b = _cut(product)
        else:
            share = np.maximum(owners, 1) if method.divide == "owners" else np.full(RANK, float(len(tiers)))
            lora_a, lora_b = lora_a + sums["a"] / share[:, None], lora_b + sums["b"] / share
        if method.rebalance and number % REBALANCE_EVERY == 0:
            lora_a, lora_b, turn, back = _rebalance(lora_a, lora_b)
            for residual in residuals:
                residual["a"], residual["b"] = back @ residual["a"], residual["b"] @ turn
        if number == EARLY:
            early = task.error(lora_a, lora_b)
    return early, task.error(lora_a, lora_b)


def _train_part(
    method: Method,
    task: Task,
    client: int,
    lora_a: np.ndarray,
    lora_b: np.ndarray,
    owned: np.ndarray,
    move: str,
    rate: float,
) -> tuple[np.ndarray, np.ndarray]:
    delta_a, delta_b = np.zeros_like(lora_a), np.zeros_like(lora_b)
    if method.frozen_rest:
        rest = np.setdiff1d(np.arange(RANK), owned)
        # The frozen part adds a constant to the output, so it is subtracted from the target.
        shifted = copy.copy(task)
        shifted.targets = [target - lora_b[:, rest] @ lora_a[rest] for target in task.targets]
        task = shifted
    delta_a[owned], delta_b[:, owned] = train(task, client, lora_a[owned], lora_b[:, owned], move, rate)
    return delta_a, delta_b


def _sent(
    method: Method,
    delta: np.ndarray,
    letter: str,
    owned: np.ndarray,
    residual: dict[str, np.ndarray],
    random: np.random.Generator,
) -> np.ndarray:
    if method.bits is None:
        return delta
    part = (owned,) if letter == "a" else (slice(None), owned)
    wanted = delta[part] + residual[letter][part]
    step = 6 * np.sqrt(np.square(wanted).mean()) / (2**method.bits - 1)
    sent = np.clip(np.floor(wanted / step + random.random(wanted.shape)), -(2**method.bits), 2**method.bits) * step
    residual[letter][part] = wanted - sent
    whole = np.zeros_like(delta)
    whole[part] = sent
    return whole


def _cut(product: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    left, values, right = np.linalg.svd(product)
    roots = np.sqrt(values[:RANK])
    return right[:RANK] * roots[:, None], left[:, :RANK] * roots


def _rebalance(lora_a: np.ndarray, lora_b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    q_b, r_b = np.linalg.qr(lora_b)
    q_a, r_a = np.linalg.qr(lora_a.T)
    left, values, right = np.linalg.svd(r_b @ r_a.T)
    roots = np.sqrt(np.maximum(values, 1e-12))
    return (
        roots[:, None] * (right @ q_a.T),
        q_b @ left * roots,
        r_a.T @ right.T / roots,
        left.T @ r_b / roots[:, None],
    )


def table(tiers: list[int]) -> str:
    """Formats the median over the seeds as a Markdown table."""
    lines = [
        f"| method | round {EARLY} | round {ROUNDS} | range over {len(SEEDS)} seeds |",
        "| --- | --- | --- | --- |",
    ]
    for name, method in METHODS.items():
        results = np.array([run(method, tiers, seed) for seed in SEEDS])
        early, last = np.median(results, axis=0)
        low, high = results[:, 1].min(), results[:, 1].max()
        lines.append(f"| {name} | {early:.4f} | {last:.4f} | {low:.4f} … {high:.4f} |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="print the tables, but leave RESULTS.md as it is")
    options = parser.parse_args()
    mixed, equal = table(MIXED), table([RANK] * CLIENTS)
    if options.dry:
        return
    question, _, rest = (__doc__ or "").partition("\n\n")
    text = [
        "# Combining adapters: the toy tables",
        question,
        f"`python benchmarks/aggregation/toy.py` on {datetime.date.today():%Y-%m-%d}, numpy {np.__version__}.",
        "Relative squared error, the median over seeds.",
        "## Mixed ranks 4, 8 and 16",
        mixed,
        "## All rank 16",
        equal,
        rest.strip(),
    ]
    (HERE / "RESULTS.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
