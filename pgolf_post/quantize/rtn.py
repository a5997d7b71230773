"""Round to nearest: each weight to the closest symbol of its grid. What GPTQ becomes when H = I."""

from __future__ import annotations

from torch import Tensor


def round_to_nearest(
    weight: Tensor,  # (out, in) float32
    steps: Tensor,  # (out,), or broadcasts to (out, in); float32
    largest: int,  # symbols are clipped to ±largest
) -> Tensor:  # (out, in) int32
    """Return the symbols of `weight`."""
    spread = steps[:, None] if steps.ndim == 1 else steps
    return (weight / spread).round().clamp(-largest, largest).int()
