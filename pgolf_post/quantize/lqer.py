"""LQER: the largest errors of quantization, put back as two small low-bit factors (Zhang et al., arXiv 2402.02446).

E = W - Ŵ is cut to its best rank-r approximation U·S·Vᵀ; A = U·S (out, r) and B = Vᵀ (r, in) are quantized and stored
beside the matrix, Ŵ + A·B being what is used. Only the tensors with the largest ‖E‖ are worth their bytes. The record's
asymmetric form (PR #1855, openai/parameter-golf): A in two bits, -2 .. 1, with one step max|A|/1.5; B in four bits,
-8 .. 7, in groups of 64 with step max/7.5. The symmetric form gives both `bits` bits and a step per rank.

A 2×2 worked example: E = [[2, 1], [4, 2]] has rank 1: S = 5, U = (1, 2)/√5, V = (2, 1)/√5, so that rank 1 restores it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pgolf_post.plan import LqerSettings
from pgolf_post.quantize.stored_steps import octaves_of, power_factor
from pgolf_post.quantize.tensor import LOW_RANK, QuantizedTensor, ScaleFactor

ASYMMETRIC_GROUP = 64


def low_rank(error: Tensor, rank: int) -> tuple[Tensor, Tensor]:  # (out, in) → (out, r), (r, in)
    """Return the best rank-r factors of a matrix, in its own dtype; r is at most its smaller side."""
    rank = min(rank, *error.shape)
    u, s, vh = torch.linalg.svd(error.double(), full_matrices=False)
    return (u[:, :rank] * s[:rank]).to(error.dtype), vh[:rank].to(error.dtype)


def quantize_factor(
    name: str,
    factor: Tensor,  # (rows, columns) float32
    low: int,  # least symbol
    high: int,  # largest symbol
    reach: float,  # step = max|value| / reach
    group: int,  # values in row-major order that share a step
) -> QuantizedTensor:
    """Round to nearest with a step per group of values; groups of zeros, next to the largest, have any step."""
    values = factor.reshape(-1)
    padded = torch.nn.functional.pad(values, (0, -len(values) % group)).reshape(-1, group)
    steps = padded.abs().amax(dim=1).double() / reach
    octaves = max(0, octaves_of(steps))  # of errors beyond fp16's range; small steps may be zero
    halves = (steps * 2.0**-octaves).to(torch.float16)
    halves = torch.where(halves > 0, halves, torch.ones_like(halves))
    symbols = (padded / (halves.float() * 2.0**octaves)[:, None]).round().clamp(low, high).to(torch.int8)
    array = symbols.reshape(-1)[: len(values)].reshape(factor.shape).numpy()
    grid = ScaleFactor("group", halves.numpy(), group) if len(halves) > 1 else ScaleFactor("tensor", halves.numpy())
    factors = (grid, *power_factor(octaves))
    return QuantizedTensor(name, np.ascontiguousarray(array), factors, tuple(factor.shape), facts={"method": "lqer"})


def correction(name: str, error: Tensor, settings: LqerSettings) -> tuple[QuantizedTensor, QuantizedTensor]:
    """Return the quantized factors of one tensor's error (out, in)."""
    a, b = low_rank(error.float(), settings.rank)
    names = [name + suffix for suffix in LOW_RANK]
    if settings.asymmetric:
        left = quantize_factor(names[0], a, -2, 1, 1.5, a.numel())
        return left, quantize_factor(names[1], b, -8, 7, 7.5, ASYMMETRIC_GROUP)
    largest = 2 ** (settings.bits - 1) - 1
    turned = quantize_factor(names[0], a.T.contiguous(), -largest, largest, largest, len(a))
    steps = turned.factors[0].values
    columns = ScaleFactor("column", steps) if len(steps) > 1 else ScaleFactor("tensor", steps)
    factors = (columns, *turned.factors[1:])
    left = QuantizedTensor(
        names[0], np.ascontiguousarray(turned.symbols.T), factors, tuple(a.shape), facts=turned.facts
    )
    return left, quantize_factor(names[1], b, -largest, largest, largest, b.shape[1])


def corrections(
    weights: Mapping[str, Tensor],  # name → (out, in), the matrices that may be corrected
    quantized: Mapping[str, QuantizedTensor],
    settings: LqerSettings,
) -> dict[str, QuantizedTensor]:
    """Return factors for the `top_k` matrices with the largest ‖W - Ŵ‖, with the share of ‖W - Ŵ‖² each takes back."""
    errors = {name: weights[name].float() - torch.from_numpy(quantized[name].dequantize()) for name in weights}
    worst = sorted(errors, key=lambda name: (-float(errors[name].norm()), name))[: settings.top_k]
    factors: dict[str, QuantizedTensor] = {}
    for name in worst:
        a, b = correction(name, errors[name], settings)
        left = errors[name] - torch.from_numpy(a.dequantize() @ b.dequantize())
        energy = float(errors[name].square().sum())
        facts: dict[str, Any] = {
            "method": "lqer", "role": "lqer", "rank": a.shape[1], "error_norm": energy**0.5,
            "energy_restored": 1 - float(left.square().sum()) / energy if energy else 0.0,
        }  # fmt: skip
        for half in (a, b):
            factors[half.name] = QuantizedTensor(half.name, half.symbols, half.factors, half.shape, facts=facts)
    return factors
