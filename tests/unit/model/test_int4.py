"""The int4 grid: least error, the layout of onnxruntime, and the same bits on every machine."""

from __future__ import annotations

import hashlib

import hypothesis.strategies as st
import numpy as np
import onnx
import onnxruntime  # type: ignore[import-untyped]
import pytest
import torch
from hypothesis import example, given, settings
from onnx import TensorProto, helper, numpy_helper

from fedtune.core.errors import ModelError
from fedtune.model.int4 import BLOCK, GridWeight, dequantize, quantize

SHAPES = [(1, 32), (3, 64), (7, 96), (5, 33), (4, 1), (9, 100)]


def weights(shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02


def round_to_nearest(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """Rounds to the grid from a block's least value to its largest, as quantizers without a search do."""
    top = 2**bits - 1
    blocks = torch.nn.functional.pad(weight, (0, -weight.shape[1] % BLOCK)).reshape(-1, BLOCK)
    low, high = blocks.amin(1).clamp(max=0), blocks.amax(1).clamp(min=0)
    scale = ((high - low) / top).clamp(min=1e-30)[:, None]
    zero = (-low[:, None] / scale).round()
    rounded: torch.Tensor = scale * ((blocks / scale).round().clamp(-zero, top - zero))
    return rounded.reshape(len(weight), -1)[:, : weight.shape[1]]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 200),
    magnitude=st.sampled_from([1e-20, 1e-6, 1.0, 1e4, 1e20]),
    shift=st.sampled_from([0.0, 0.05, -0.05]),
    bits=st.sampled_from([4, 8]),
    seed=st.integers(0, 99),
)
def test_the_search_is_never_worse_than_rounding_to_nearest(
    rows: int, columns: int, magnitude: float, shift: float, bits: int, seed: int
) -> None:
    weight = weights((rows, columns), seed) + shift
    found = dequantize(quantize(weight * magnitude, bits), torch.float32) / magnitude
    error, plain = (float((each - weight).double().square().sum()) for each in (found, round_to_nearest(weight, bits)))
    assert error <= plain * 1.0001 + 1e-9 * float(weight.square().sum())


def test_the_search_is_better_than_rounding_to_nearest_on_the_whole() -> None:
    weight = weights((256, 1024))
    error, plain = (
        float((each - weight).square().sum())
        for each in (dequantize(quantize(weight), torch.float32), round_to_nearest(weight, 4))
    )
    assert error < 0.97 * plain


def test_columns_that_matter_more_have_less_error() -> None:
    weight = weights((64, 256))
    importance = torch.ones(256)
    importance[::4] = 100.0
    plain, weighted = (
        (dequantize(quantize(weight, importance=each), torch.float32) - weight).square().mean(0)
        for each in (None, importance)
    )
    assert weighted[::4].mean() < 0.7 * plain[::4].mean()
    assert (weighted * importance).sum() < (plain * importance).sum()


@pytest.mark.parametrize("value", [0.0, 0.3, -0.3, 1e-35])
def test_blocks_of_one_value_keep_it(value: float) -> None:
    weight = torch.full((2, 70), value)
    expected = weight if abs(value) > 1e-30 else torch.zeros(2, 70)
    assert torch.allclose(dequantize(quantize(weight), torch.float32), expected, rtol=1e-6, atol=0)


@settings(max_examples=60, deadline=None)
@example(rows=3, columns=3, bits=8, spread=1)  # one value of a block is far larger than the others
@given(rows=st.integers(1, 5), columns=st.integers(1, 100), bits=st.sampled_from([4, 8]), spread=st.integers(0, 99))
def test_a_weight_on_a_grid_keeps_its_values(rows: int, columns: int, bits: int, spread: int) -> None:
    once = dequantize(quantize(weights((rows, columns), spread).pow(3), bits), torch.float32)
    again = dequantize(quantize(once, bits, keep=True), torch.float32)
    assert torch.allclose(again, once, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_onnxruntime_multiplies_with_the_same_numbers(shape: tuple[int, int], bits: int) -> None:
    packed = quantize(weights(shape), bits)
    x = weights((6, shape[1]), seed=1)
    expected = x @ dequantize(packed, torch.float32).T
    assert np.allclose(product(packed, x.numpy()), expected.numpy(), atol=1e-6)


def product(packed: GridWeight, x: np.ndarray) -> np.ndarray:
    """Runs MatMulNBits with float32 products."""
    d_out, d_in = packed.shape
    tensors = {"b": packed.codes, "scales": packed.scales, "zeros": packed.zeros}
    node = helper.make_node(
        "MatMulNBits",
        ["x", *tensors],
        ["y"],
        domain="com.microsoft",
        K=d_in,
        N=d_out,
        bits=packed.bits,
        block_size=BLOCK,
        accuracy_level=1,
    )
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, d_in])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, d_out])],
        [numpy_helper.from_array(tensor.numpy(), name) for name, tensor in tensors.items()],
    )
    domains = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=domains, ir_version=10)
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    result: np.ndarray = session.run(None, {"x": x})[0]
    return result


@pytest.mark.parametrize("threads", [1, 2])
def test_the_bits_are_the_same_on_every_machine(threads: int) -> None:
    """The digest is of the codes, scales and zero points of weights that any machine makes exactly."""
    torch.set_num_threads(threads)
    numbers = (torch.arange(96 * 200, dtype=torch.int64) * 7919 % 10_007 - 5000).reshape(96, 200)
    packed = quantize(numbers.float() / 4096)
    digest = hashlib.sha256()
    for tensor in packed.tensors.values():
        digest.update(tensor.numpy().tobytes())
    assert digest.hexdigest() == "ca1ff0db77178d906e7d295f783f596dfbf4f1b6aea54677a15eff6aee1b0d46"


def test_a_weight_that_is_not_finite_is_refused() -> None:
    weight = weights((4, 64))
    weight[2, 3] = torch.nan
    with pytest.raises(ModelError, match="not finite"):
        quantize(weight)


def test_a_number_takes_five_bits_and_an_eighth() -> None:
    packed = quantize(weights((512, 1024)))
    bits = 8 * sum(tensor.numel() * tensor.element_size() for tensor in packed.tensors.values())
    assert bits / (512 * 1024) == 5.125
