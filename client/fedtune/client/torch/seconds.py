"""How long a training step takes, and a round: operations over a measured rate, bytes over bandwidth.

    forward   2·N_lin + 2·V·d·share + 4·L·s·q     a token: products with frozen weights, logits of targets, attention
    backward  2·N_lin + 2·V·d·share + 8·L·s·q     input gradients only; frozen weights have none
    recompute the forward pass of the blocks, where activations are checkpointed
    adapter   6·P
    t_round = tokens / tokens_per_second + bytes_up / bandwidth_up + bytes_down / bandwidth_down

A step never reaches the rate of its largest product alone; EFFICIENCY is what benchmarks/plan found. One real step
replaces the whole estimate, per device and model.
"""

from __future__ import annotations

import time

import torch

from fedtune.client.plan.memory import Choices
from fedtune.model.base_model import DTYPES
from fedtune.model.shape import ModelShape

EFFICIENCY = 0.35
PACKED_SLOWDOWN = 1.3  # what unpacking NF4 for every product costs on CPUs
_PRODUCT_ROWS = 512
_PRODUCT_SECONDS = 0.2


def operations_per_token(shape: ModelShape, choices: Choices, target_share: float = 1.0) -> float:
    """Floating-point operations a token of a training step."""
    products = 2.0 * shape.linear_parameters
    attention = 4.0 * shape.layers * choices.sequence_length * shape.query_width
    head = 2.0 * shape.vocabulary * shape.width * target_share
    adapter = 6.0 * shape.adapter_parameters(choices.rank)
    recompute = products + attention if choices.checkpointing else 0.0
    return 2 * products + 3 * attention + 2 * head + recompute + adapter


def step_seconds(shape: ModelShape, choices: Choices, rate: float, tokens: int, target_share: float = 1.0) -> float:
    """Seconds for a step of so many tokens on a device whose products reach `rate` operations a second."""
    seconds = tokens * operations_per_token(shape, choices, target_share) / (rate * EFFICIENCY)
    return seconds * (PACKED_SLOWDOWN if choices.weights == "packed" else 1.0)


def product_rate(shape: ModelShape, choices: Choices, device: torch.device) -> float:
    """Operations a second of products of the model's own size, in its arithmetic, as this process does them."""
    largest = max(shape.linear, key=lambda module: module.d_in * module.d_out)
    dtype = DTYPES[choices.precision]
    left = torch.randn(_PRODUCT_ROWS, largest.d_in, device=device).to(dtype)
    right = torch.randn(largest.d_out, largest.d_in, device=device).to(dtype)
    torch.nn.functional.linear(left, right)  # kernels are chosen at the first call
    done, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < _PRODUCT_SECONDS:
        torch.nn.functional.linear(left, right)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        done += 1
    return 2.0 * _PRODUCT_ROWS * largest.d_in * largest.d_out * done / elapsed
