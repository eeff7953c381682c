"""Local work: the training that a job asks of each client, from the key in the job file to the field of the request.

    [training]                                # a job
    learning_rate = 2e-3
        ->  TrainingSettings(learning_rate=2e-3)
        ->  LocalWork(learning_rate=2e-3)     # in every request of a round, with that round's learning rate

A trainer finds the work in its task. The other settings serve planning, or the server alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import msgspec
from msgspec import Meta
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from fedtune.core.adapter.layout import AdapterKind, Factors

DEFAULT_LOCAL_STEPS = 20
Optimizer = Literal["adamw", "muon"]
OPTIMIZERS: Mapping[AdapterKind, Optimizer] = {"lora": "adamw", "core": "muon"}  # where a job names none

_PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True))
class TrainingSettings:
    """[training]: the work of a client on the adapter that it receives.

    Args:
        local_steps: optimizer steps per round; 20 where neither this nor `local_epochs` is set.
        local_epochs: passes over the client's examples per round, instead of `local_steps`.
        batch_tokens: tokens per optimizer step, padding included; reached by accumulation where memory is short.
        optimizer: "adamw", or "muon" (Jordan et al. 2024), which moves every matrix by an orthogonal one; without it
            "muon" for core adapters and "adamw" for LoRA. Every round starts a new one.
        learning_rate: learning rate of the optimizer in round 1. Where it is not set, the run sets it by the adapter's
            kind and the base model's width (fedtune.core.job.learning_rates).
        schedule: decay of the learning rate to 0 over the job's rounds; the server sends each round's value.
        weight_decay: share of a weight, times the learning rate, that each step takes off it.
        max_gradient_norm: norm to which longer gradients are scaled down.
        proximal: the μ of FedProx (Li et al. 2020), which pulls each step back to the received adapter; 0 for none.
        precision: format of the arithmetic; "auto" takes bf16 where the hardware has it, fp16 on older GPUs, else fp32.
        weights: format of the reference base on a device: "packed" (least memory), "dequantized" (fastest), or "auto".
        gradient_checkpointing: whether activations are computed twice instead of kept.
        seed: seed of the job, from which all its random streams follow.
    """

    local_steps: Annotated[int, Field(ge=1)] | None = None
    local_epochs: _PositiveFloat | None = None
    batch_tokens: Annotated[int, Field(ge=8, le=1 << 24)] = 2048
    optimizer: Optimizer | None = None
    learning_rate: Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)] | None = None
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    weight_decay: _NonNegativeFloat = 0.0
    max_gradient_norm: _PositiveFloat = 1.0
    proximal: _NonNegativeFloat = 0.0
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    weights: Literal["auto", "packed", "dequantized"] = "auto"
    gradient_checkpointing: bool = False
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0

    @property
    def steps(self) -> int:
        """The optimizer steps per round; where the job counts epochs, the default as an estimate."""
        return self.local_steps or DEFAULT_LOCAL_STEPS

    @property
    def first_learning_rate(self) -> float:
        """The learning rate of round 1.

        Raises:
            ValueError: it is not set; `with_learning_rate` sets it once the base is known.
        """
        if self.learning_rate is None:
            raise ValueError("training.learning_rate is not set; expected a job from with_learning_rate")
        return self.learning_rate


class LocalWork(msgspec.Struct, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """The work of a client on the adapter that it receives in one round; one of `local_steps` and `local_epochs` is 0.

    Args:
        factors: factors that are trained; the others stay as received.
        optimizer: optimizer of the local steps.
        learning_rate: learning rate of this round.
        holdout: share of the client's examples on which it does not train.
        proximal: μ of FedProx (Li et al. 2020): the gradient of μ/2·‖now - received‖², which is μ·(now - received), is
            added to every step's.
        align: whether the trained factors are aligned to the received ones before they are sent.
        deadline: seconds after which the update should have arrived; a client that needs longer for all of the work
            does less of it. 0 where the round waits for all clients.
    """

    factors: Factors
    local_steps: Annotated[int, Meta(ge=0, le=1 << 20)]
    local_epochs: Annotated[float, Meta(ge=0, le=1e6)]
    batch_tokens: Annotated[int, Meta(ge=8, le=1 << 24)]
    learning_rate: Annotated[float, Meta(gt=0)]
    weight_decay: Annotated[float, Meta(ge=0)]
    max_gradient_norm: Annotated[float, Meta(gt=0)]
    gradient_checkpointing: bool
    holdout: Annotated[float, Meta(ge=0, lt=1)]
    optimizer: Optimizer = "adamw"
    proximal: Annotated[float, Meta(ge=0)] = 0.0
    align: bool = False
    deadline: Annotated[float, Meta(ge=0, le=1e7)] = 0.0

    def scaled(self, share: float) -> LocalWork:
        """Returns this share of the work, but at least one step."""
        steps = max(1, round(share * self.local_steps)) if self.local_steps else 0
        return msgspec.structs.replace(self, local_steps=steps, local_epochs=share * self.local_epochs)


def local_work(
    settings: TrainingSettings,
    factors: Factors = "ab",
    *,
    learning_rate: float | None = None,
    holdout: float = 0.0,
    align: bool = False,
    deadline: float = 0.0,
) -> LocalWork:
    """Returns the work that a job's settings ask for.

    Args:
        learning_rate: this round's; the settings' where it is None.
    """
    epochs = settings.local_epochs or 0.0
    return LocalWork(
        factors=factors,
        optimizer=settings.optimizer or OPTIMIZERS["core" if factors == "r" else "lora"],
        local_steps=0 if epochs else settings.steps,
        local_epochs=epochs,
        batch_tokens=settings.batch_tokens,
        learning_rate=settings.first_learning_rate if learning_rate is None else learning_rate,
        weight_decay=settings.weight_decay,
        max_gradient_norm=settings.max_gradient_norm,
        gradient_checkpointing=settings.gradient_checkpointing,
        holdout=holdout,
        proximal=settings.proximal,
        align=align,
        deadline=deadline,
    )
