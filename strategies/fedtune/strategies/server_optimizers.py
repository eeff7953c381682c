"""Server optimizers: the server's step along a round's aggregate, plain or by an optimizer with state.

    step, state = optimizer.step(factor, aggregate, state)
    adapter[layout.segment(factor)] += step

The aggregate Δ is a negative gradient (Reddi et al. 2021, Adaptive Federated Optimization, algorithm 2):

    momentum   m ← β₁·m + Δ                          x ← x + η·m
    adam       v ← β₂·v + (1 - β₂)·Δ²
    yogi       v ← v - (1 - β₂)·Δ²·sign(v - Δ²)      m ← β₁·m + (1 - β₁)·Δ
    adagrad    v ← v + Δ²                            x ← x + η·m / (√v + τ),   v₀ = τ²

Each factor has a state of its own, which changes only in rounds that train it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from fedtune.core.adapter.layout import FACTORS, Factor, Vector

State = Mapping[str, Vector]
Move = Callable[[Factor, Vector], Vector]
MOMENTUM = "optimizer.m"
SECOND_MOMENT = "optimizer.v"


class ServerOptimizer(Protocol):
    """An optimizer that takes the server's step."""

    def step(self, factor: Factor, aggregate: Vector, state: State) -> tuple[Vector, State]:
        """Returns the float32 step to add to the factor, and the state for the next round; `state` is not changed."""

    def rebased(self, state: State, move: Move) -> tuple[State, str | None]:
        """Returns the state after a change of the adapter's basis, and a note if part of it was lost.

        Args:
            move: (factor, values) -> the values in the new basis.
        """


@dataclass(frozen=True)
class Plain:
    """Adds the aggregate itself: FedAvg's step of 1."""

    def step(self, factor: Factor, aggregate: Vector, state: State) -> tuple[Vector, State]:
        """Returns the aggregate."""
        del factor
        return aggregate, state

    def rebased(self, state: State, move: Move) -> tuple[State, str | None]:
        """Returns the state unchanged; it is empty."""
        del move
        return state, None


@dataclass(frozen=True)
class Momentum:
    """FedAvgM (Hsu et al. 2019).

    Args:
        learning_rate: η.
        beta: β₁.
    """

    learning_rate: float = 1.0
    beta: float = 0.9

    def step(self, factor: Factor, aggregate: Vector, state: State) -> tuple[Vector, State]:
        """Returns η·m."""
        name = f"{MOMENTUM}.{factor}"
        momentum = np.float32(self.beta) * state.get(name, np.zeros_like(aggregate)) + aggregate
        return np.float32(self.learning_rate) * momentum, {**state, name: momentum}

    def rebased(self, state: State, move: Move) -> tuple[State, str | None]:
        """Returns the momentum in the new basis; it is a sum of aggregates, and changes basis as they do."""
        names = {f"{MOMENTUM}.{factor}": factor for factor in FACTORS}
        return {name: move(names[name], value) if name in names else value for name, value in state.items()}, None


@dataclass(frozen=True)
class Adaptive:
    """FedAdam, FedYogi and FedAdagrad.

    Args:
        second: update rule of the second moment.
        learning_rate: η; about the size of a coordinate's step.
        beta: β₁.
        beta_second: β₂; Adagrad has none.
        floor: τ.
    """

    second: Literal["adam", "yogi", "adagrad"]
    learning_rate: float = 1e-2
    beta: float = 0.9
    beta_second: float = 0.99
    floor: float = 1e-3

    def step(self, factor: Factor, aggregate: Vector, state: State) -> tuple[Vector, State]:
        """Returns η·m / (√v + τ)."""
        first, second = f"{MOMENTUM}.{factor}", f"{SECOND_MOMENT}.{factor}"
        before: Vector = state.get(second, np.full_like(aggregate, self.floor**2))
        square, fresh = np.square(aggregate), np.float32(1.0 - self.beta_second)
        moment: Vector
        match self.second:
            case "adam":
                moment = (np.float32(self.beta_second) * before + fresh * square).astype(np.float32)
            case "yogi":
                moment = (before - fresh * square * np.sign(before - square)).astype(np.float32)
            case "adagrad":
                moment = before + square
        beta = np.float32(self.beta)
        momentum = beta * state.get(first, np.zeros_like(aggregate)) + (np.float32(1.0) - beta) * aggregate
        step = np.float32(self.learning_rate) * momentum / (np.sqrt(moment) + np.float32(self.floor))
        return step.astype(np.float32), {**state, first: momentum, second: moment}

    def rebased(self, state: State, move: Move) -> tuple[State, str | None]:
        """Resets both moments: squares do not carry over to another basis, and a step is the ratio of the two."""
        del move
        kept = {name: value for name, value in state.items() if not name.startswith((MOMENTUM, SECOND_MOMENT))}
        return kept, "the server optimizer starts again: squares of coordinates say nothing of another basis"


def server_optimizer_named(name: str, learning_rate: float | None = None) -> ServerOptimizer:
    """Returns the optimizer that a job's `federation.server_optimizer` names.

    Args:
        learning_rate: η, or None for the optimizer's own.
    """
    match name:
        case "none":
            return Plain()
        case "momentum":
            return Momentum() if learning_rate is None else Momentum(learning_rate)
        case "adam" | "yogi" | "adagrad":
            return Adaptive(name) if learning_rate is None else Adaptive(name, learning_rate)
    raise ValueError(f"no server optimizer is named {name!r}")
