"""The optimizers in numpy take torch's steps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from local_tasks import local_task
from torch.optim import _muon

from fedtune.client.onnx.numpy_optimizers import AdamW, Muon, orthogonalized
from fedtune.core.adapter.layout import Extent
from fedtune.core.bfloat16 import round_to_bfloat16

WORK = local_task(learning_rate=2e-3, weight_decay=0.1).work
STEPS = 20


def gradients(size: int) -> list[torch.Tensor]:
    """Returns gradients of many magnitudes, below AdamW's epsilon too."""
    random = np.random.default_rng(3)
    magnitudes = 10.0 ** random.integers(-9, 1, (STEPS, size))
    return list(torch.from_numpy((random.standard_normal((STEPS, size)) * magnitudes).astype(np.float32)))


def test_adamw_is_torch_s_to_the_last_bits() -> None:
    start = torch.linspace(-2, 2, 1000)
    theirs, ours = torch.nn.Parameter(start.clone()), start.numpy().copy()
    reference = torch.optim.AdamW([theirs], lr=WORK.learning_rate, weight_decay=WORK.weight_decay, fused=True)
    optimizer = AdamW(WORK, len(ours))
    for gradient in gradients(len(ours)):
        theirs.grad = gradient.clone()
        reference.step()
        optimizer.step(ours, gradient.numpy())
    np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=0, atol=5e-7)


def test_muon_is_torch_s() -> None:
    shapes = [(8, 8), (4, 64), (96, 8)]
    start = torch.linspace(-2, 2, sum(rows * columns for rows, columns in shapes))
    ours, theirs, extents, first = start.numpy().copy(), [], [], 0
    for shape in shapes:
        where = slice(first, first + shape[0] * shape[1])
        extents.append(Extent(where, shape))
        theirs.append(torch.nn.Parameter(start[where].reshape(shape).clone()))
        first = where.stop
    reference = torch.optim.Muon(
        theirs, lr=WORK.learning_rate, weight_decay=WORK.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    optimizer = Muon(WORK, extents, len(ours))
    for gradient in gradients(len(ours)):
        for parameter, (where, shape) in zip(theirs, extents, strict=True):
            parameter.grad = gradient[where].reshape(shape).clone()
        reference.step()  # type: ignore[no-untyped-call]
        optimizer.step(ours, gradient.numpy())
    flat = torch.cat([parameter.detach().reshape(-1) for parameter in theirs]).numpy()
    np.testing.assert_allclose(ours, flat, rtol=0, atol=2e-4)  # a step is 0.2 · √96 · 2e-3 = 4e-3


@pytest.mark.parametrize("shape", [(1, 1), (8, 8), (4, 64), (96, 8), (32, 128)])
def test_orthogonalisation_rounds_as_torch_s_does(shape: tuple[int, int]) -> None:
    matrix = np.random.default_rng(1).standard_normal(shape).astype(np.float32) * np.float32(1e-3)
    constants = (_muon.DEFAULT_A, _muon.DEFAULT_B, _muon.DEFAULT_C)
    theirs = _muon._zeropower_via_newtonschulz(torch.from_numpy(matrix), constants, _muon.DEFAULT_NS_STEPS, _muon.EPS)
    np.testing.assert_allclose(orthogonalized(matrix), theirs.float().numpy(), rtol=0, atol=1e-2)


def test_a_matrix_of_zeros_stays_one() -> None:
    assert not orthogonalized(np.zeros((4, 4), dtype=np.float32)).any()


def test_rounding_to_bfloat16_is_torch_s_ties_included() -> None:
    bits = np.random.default_rng(2).integers(0, 1 << 32, 4096, dtype=np.uint32)
    bits[:256] = bits[:256] >> 16 << 16 | 0x8000  # halfway between two values
    values = bits.view(np.float32)
    values = values[np.isfinite(values) & (np.abs(values) < 1e38)]
    assert np.array_equal(round_to_bfloat16(values), torch.from_numpy(values).bfloat16().float().numpy())
