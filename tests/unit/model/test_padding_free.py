"""Attention over a row of examples is that of each example alone, and what a client has reaches no other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fedtune.data.batches import row_starts
from fedtune.model.padding_free import ATTENTION, NO_MASK, PLACES, Places

HEADS, WIDTH = 2, 4
groups = st.lists(st.lists(st.integers(1, 20), max_size=20), min_size=1, max_size=4).filter(any)


class Layer(nn.Module):
    """A layer, as far as attention looks at it."""

    is_causal = True


def attend(states: list[Tensor], places: Places, mask: Tensor | None = NO_MASK) -> Tensor:
    """Returns the attention of (query, key, value), each (1, H, T, D): (1, T, H, D)."""
    attention: Any = ALL_ATTENTION_FUNCTIONS[ATTENTION]
    output: Tensor = attention(Layer(), *states, mask, **{PLACES: places})[0]
    return output


def random_states(tokens: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(1, HEADS, tokens, WIDTH, generator=draw).requires_grad_() for _ in range(3)]


def stretches_of(lengths: list[list[int]]) -> list[tuple[list[int], slice]]:
    """Returns the tokens of each client's examples, and all tokens of its stretch."""
    starts, stretches = row_starts(lengths)
    found, first, beginnings = [], 0, iter(starts)
    for own, stretch in zip(lengths, stretches, strict=True):
        tokens = [token for length in own for start in [next(beginnings)] for token in range(start, start + length)]
        found.append((tokens, slice(first, first + stretch)))
        first += stretch
    return found


@given(lengths=groups)
def test_attention_and_its_gradients_are_those_of_each_example_alone(lengths: list[list[int]]) -> None:
    starts, stretches = row_starts(lengths)
    places = Places.of(lengths)
    states, alone = random_states(sum(stretches)), random_states(sum(stretches))
    output = attend(states, places)
    weights = torch.zeros_like(output)
    for start, length in zip(starts, [each for own in lengths for each in own], strict=True):
        where = slice(start, start + length)
        assert places.positions[0, where].tolist() == list(range(length))
        query, key, value = (each[:, :, where] for each in alone)
        own = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        torch.testing.assert_close(output[:, where], own.transpose(1, 2), rtol=1e-5, atol=1e-6)
        weights[:, where] = torch.randn(weights[:, where].shape)
        torch.autograd.backward(own, weights[:, where].transpose(1, 2))
    torch.autograd.backward(output, weights)
    for found, expected in zip(states, alone, strict=True):
        assert found.grad is not None
        assert expected.grad is not None
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-5)


@given(lengths=groups, astray=st.integers(0, 3))
def test_values_that_are_not_finite_stay_with_their_client(lengths: list[list[int]], astray: int) -> None:
    of_clients = stretches_of(lengths)
    _, broken = of_clients[astray % len(of_clients)]
    states = random_states(sum(row_starts(lengths)[1]))
    with torch.no_grad():
        for each in states:
            each[:, :, broken] = torch.nan
    output = attend(states, Places.of(lengths))
    weights = torch.zeros_like(output)
    for tokens, _ in of_clients:
        weights[:, tokens] = 1.0
    torch.autograd.backward(output, weights)
    for _, where in of_clients:
        if where != broken:
            assert output[:, where].isfinite().all()
            assert all(each.grad is not None and each.grad[:, :, where].isfinite().all() for each in states)


def test_a_mask_of_an_architecture_s_own_is_refused() -> None:
    states = random_states(8)
    with pytest.raises(ValueError, match="a mask of its own"):
        attend(states, Places.of([[8]]), torch.ones(1, 1, 8, 8, dtype=torch.bool))
