"""Rounding a matrix to the int4 grid with the errors of early columns compensated in later ones.

A product's input x has the Gram matrix H = Σ x xᵀ over calibration tokens. Rounding W, (d_out, d_in), column by column,
with U the upper Cholesky factor of (H + λ·I)⁻¹, H scaled to a mean diagonal of 1:

    e = (W_j - Ŵ_j) / U_jj             the error of column j
    W_k -= U_jk · e     for k > j      the later columns make up for it in the output

This is GPTQ (Frantar et al. 2022); scales and zero points of a block come from the search of int4.py when the rounding
reaches it, weighed by the diagonal of H. On SmolLM2-135M, the perplexity of completions rises by 1% with it
and by 52% without.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedtune.model.int4 import BLOCK, GridWeight, dequantize, pack, quantize, zero_points

DAMPING = 0.01  # λ


def round_compensated(weight: Tensor, gram: Tensor, bits: int) -> GridWeight:
    """Packs a matrix of shape (d_out, d_in), given the Gram matrix of its inputs, (d_in, d_in).

    Raises:
        ModelError: a weight is not finite.
    """
    d_out, d_in = weight.shape
    blocks = -(-d_in // BLOCK)
    scaled = gram.double() / gram.diagonal().double().mean().clamp(min=1e-30)
    importance = scaled.diagonal().float()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(scaled + DAMPING * torch.eye(d_in, dtype=torch.float64)))
    factor = torch.linalg.cholesky(inverse, upper=True).float()
    left = weight.float().T.contiguous()  # (d_in, d_out): a column of W is a row here, and contiguous
    codes = torch.zeros((blocks * BLOCK, d_out), dtype=torch.uint8)
    scales, zeros = torch.empty(blocks, d_out), torch.empty((blocks, d_out), dtype=torch.uint8)
    for block, begin in enumerate(range(0, d_in, BLOCK)):
        end = min(begin + BLOCK, d_in)
        part = left[begin:end].clone()
        found = quantize(part.T.contiguous(), bits, importance=importance[begin:end])
        scale, zero = found.scales[:, 0], zero_points(found)[:, 0].float()
        inside = factor[begin:end, begin:end]
        errors = torch.empty_like(part)
        for row in range(end - begin):
            level = (part[row] / torch.where(scale > 0, scale, 1.0)).round()
            level = torch.minimum(torch.maximum(level, -zero), 2**bits - 1 - zero)
            errors[row] = (part[row] - level * scale) / inside[row, row]
            part[row + 1 :].addr_(inside[row, row + 1 :], errors[row], alpha=-1)
            codes[begin + row] = (level + zero).to(torch.uint8)
        codes[end : (block + 1) * BLOCK] = zero.to(torch.uint8)
        scales[block], zeros[block] = scale, zero.to(torch.uint8)
        left[end:].addmm_(factor[begin:end, end:].T, errors, alpha=-1)
    return pack((d_out, d_in), codes.T.reshape(d_out, blocks, BLOCK), scales.T.contiguous(), zeros.T, bits)


def output_error(weight: Tensor, packed: GridWeight, gram: Tensor | None) -> float:
    """Returns the relative squared error of a product's output, Σ ((W - Ŵ) x)² / Σ (W x)²; all x alike without H."""
    weight = weight.float()
    difference = weight - dequantize(packed, torch.float32)
    error, whole = (
        float((each if gram is None else each @ gram).mul(each).sum().clamp(min=0)) for each in (difference, weight)
    )
    return error / whole if whole > 0 else 0.0
