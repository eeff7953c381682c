"""NF4 gives the same values as bitsandbytes, whether that is installed or not."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn

from fedtune.core.errors import ModelError
from fedtune.model import nf4
from fedtune.model.nf4 import BLOCK, dequantize, quantize
from fedtune.model.packed import PackedLinear

WHOLE_BLOCKS = [(1, 64), (64, 64), (192, 256), (7, 128), (130, 1024)]
ODD_SHAPES = [(64, 96), (3, 5), (130, 70), (1, 1)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def weights(shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02


@pytest.mark.parametrize("shape", WHOLE_BLOCKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_unpacks_to_the_bits_that_bitsandbytes_unpacks_to(shape: tuple[int, int], dtype: torch.dtype) -> None:
    packed = quantize(weights(shape))
    assert torch.equal(dequantize(packed, dtype), nf4.bitsandbytes_dequantize(packed, dtype))


@pytest.mark.parametrize("shape", [*WHOLE_BLOCKS[1:], (64, 96), (513, 1024)])  # the last is more than two chunks
def test_codes_are_those_of_bitsandbytes(shape: tuple[int, int]) -> None:
    weight = weights(shape)
    codes, state = bnb.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    packed = quantize(weight)
    assert torch.equal(packed.codes, codes.reshape(-1))
    # Scales midway between two levels may differ by one level, since the mean's sums are rounded differently.
    assert (packed.scale_codes.int() - state.absmax.int()).abs().max() <= 1
    assert torch.equal(nf4.scale_map(), bnb.create_dynamic_map())  # type: ignore[no-untyped-call]


def test_a_value_beside_or_at_a_midpoint_gets_the_nearest_level_or_the_lower_one() -> None:
    levels = torch.tensor(nf4.LEVELS)
    midpoints = (levels[:-1] + levels[1:]) / 2
    edges = torch.arange(-nf4._BINS, nf4._BINS + 1) / nf4._BINS
    special = torch.cat([levels, midpoints, edges])
    beside = [torch.nextafter(special, torch.tensor(end)).clamp(-1, 1) for end in (-2.0, 2.0)]
    values = torch.cat([special, *beside, torch.linspace(-1, 1, 100_001), torch.tensor([-0.0])])
    expected = (values[:, None] > midpoints).sum(dim=1)
    assert torch.equal(nf4._nearest_level(values).long(), expected)
    assert (midpoints[:, None] - edges).abs().min() > 1e-6, "adding 1 may round a value up to the next bin's edge"


def test_a_device_that_quantizes_to_other_bits_or_not_at_all_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = nf4.quantizes_alike.__wrapped__
    assert asked("cpu")
    assert not asked("meta")
    rounded, calls = nf4._nearest_level, iter([True, False])

    def differing(values: torch.Tensor) -> torch.Tensor:
        return rounded(values).clamp_(max=14) if next(calls, False) else rounded(values)

    monkeypatch.setattr(nf4, "_nearest_level", differing)
    assert not asked("cpu")


@settings(max_examples=50, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 200),
    magnitude=st.sampled_from([1e-6, 1.0, 1e4]),
    seed=st.integers(0, 99),
)
def test_no_value_moves_by_more_than_half_a_gap_and_the_scale_s_error(
    rows: int, columns: int, magnitude: float, seed: int
) -> None:
    weight = weights((rows, columns), seed) * magnitude
    error = (dequantize(quantize(weight), torch.float32) - weight).abs().max()
    widest_gap = max(b - a for a, b in zip(nf4.LEVELS, nf4.LEVELS[1:], strict=False))
    scales = nf4._cut(weight.reshape(-1), BLOCK).abs().amax(dim=1)
    scale_error = (scales - scales.mean()).abs().max() * 0.01  # a step of the 8-bit map
    assert error <= widest_gap / 2 * scales.max() + scale_error + 1e-6 * magnitude


@pytest.mark.parametrize("shape", WHOLE_BLOCKS + ODD_SHAPES)
@pytest.mark.parametrize("unpack", [nf4.unpack_fastest, dequantize], ids=["fastest", "torch alone"])
def test_a_packed_layer_computes_what_the_dense_layer_does(shape: tuple[int, int], unpack: nf4.Unpack) -> None:
    packed, bias = quantize(weights(shape)), torch.linspace(-1, 1, shape[0])
    layer = PackedLinear(packed, bias, torch.float32, unpack)
    dense = nn.Linear(shape[1], shape[0])
    dense.weight.data, dense.bias.data = dequantize(packed, torch.float32), bias
    outputs: list[torch.Tensor] = []
    gradients: list[torch.Tensor] = []
    for module in (layer, dense):
        x = weights((5, shape[1]), seed=1).requires_grad_()
        y = module(x)
        outputs.append(y.detach())
        gradients += torch.autograd.grad(y.square().sum(), x)
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(gradients[0], gradients[1])


def test_bitsandbytes_that_fails_at_its_first_call_is_not_used() -> None:
    def broken(*_: object) -> torch.Tensor:
        raise RuntimeError("undefined symbol")

    assert not nf4.unpacks_alike(broken, "cpu")


def test_bitsandbytes_that_computes_other_values_is_not_used() -> None:
    assert not nf4.unpacks_alike(lambda packed, dtype: dequantize(packed, dtype) + 1, "cpu")


def test_bitsandbytes_works_here() -> None:
    assert nf4.bitsandbytes_works("cpu")


def test_a_weight_that_is_not_finite_is_refused() -> None:
    weight = weights((4, 64))
    weight[2, 3] = torch.inf
    with pytest.raises(ModelError, match="not finite"):
        quantize(weight)


def test_a_number_takes_a_little_more_than_four_bits() -> None:
    packed = quantize(weights((512, 1024)))
    bits = 8 * sum(tensor.numel() * tensor.element_size() for tensor in packed.tensors.values())
    assert bits / (512 * 1024) == pytest.approx(4.127, abs=1e-3)
