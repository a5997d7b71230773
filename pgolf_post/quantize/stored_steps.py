"""Steps as an artifact stores them: fp16, times one power of two where fp16 has no room.

Nearly every step is a plain fp16 number. A matrix of very small or very large weights (× 1e-9, or one row × 1e7) needs
steps below 6e-8 or above 65504. All its steps are then divided by a power of two that brings the largest to 2^14, and
the power is stored beside them, as an integer factor of the whole tensor. What remains impossible is a ratio of more
than 2^38 between two steps of one tensor.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from pgolf_post.errors import NumericsError
from pgolf_post.quantize.tensor import Axis, ScaleFactor

LARGEST_OCTAVE = 14  # of fp16, with one to spare for rounding up
LEAST_OCTAVES = -1000  # of a tensor: float64 holds its inverse; float32 has no room for such steps


def to_stored(name: str, steps: Tensor, unit: str) -> Tensor:  # (units,) float64 → float32
    """Return steps as the artifact stores them. Raises NumericsError naming tensor and unit for too wide a range."""
    octaves = octaves_of(steps)
    stored = _rounded(steps, octaves)
    if octaves and octaves_of(stored) != octaves:  # the largest was rounded up to the next power of two
        stored = _rounded(steps, octaves_of(stored))
    bad = ~(torch.isfinite(stored) & (stored > 0))
    if bad.any():
        at = int(bad.nonzero()[0])
        raise NumericsError(
            f"{name}: the step of {unit} {at} is {float(steps[at]):.3g} and the largest {float(steps.max()):.3g}; "
            "steps of one tensor may differ by a factor of 2^38",
            hint='keep the tensor as floats: a rule with tensors = "' + name + '" and method = "keep" in a --plan file',
        )
    return stored


def fits(steps: Tensor) -> bool:  # (units,)
    """Return whether each of these steps is a positive number in fp16."""
    halves = steps.to(torch.float16)
    return bool((torch.isfinite(halves) & (halves > 0)).all())


def octaves_of(steps: Tensor) -> int:  # (units,)
    """Return the power of two that is stored beside these steps; 0 where each of them fits in fp16."""
    if fits(steps):
        return 0
    finite = steps[torch.isfinite(steps) & (steps > 0)]
    return max(LEAST_OCTAVES, math.floor(math.log2(float(finite.max()))) - LARGEST_OCTAVE) if len(finite) else 0


def _rounded(steps: Tensor, octaves: int) -> Tensor:  # (units,) → the same, float32
    return ((steps.double() * 2.0**-octaves).to(torch.float16).double() * 2.0**octaves).float()


def step_factors(axis: Axis, steps: Tensor, group_size: int = 0) -> tuple[ScaleFactor, ...]:  # (units,) from to_stored
    """Return stored steps as factors of a quantized tensor."""
    octaves = octaves_of(steps)
    halves = (steps.double() * 2.0**-octaves).to(torch.float16).numpy()
    return ScaleFactor(axis, halves, group_size), *power_factor(octaves)


def power_factor(octaves: int) -> tuple[ScaleFactor, ...]:
    """Return 2^octaves as a factor of a whole tensor; none for 1."""
    return (ScaleFactor("tensor", np.array([8 * octaves], np.int16)),) if octaves else ()
