"""Round to nearest: each weight to the closest symbol of its grid. What GPTQ becomes when H = I."""

from __future__ import annotations

from torch import Tensor


def round_to_nearest(
    weight: Tensor,  # (out, in) float32
    scales: Tensor,  # (out,), or broadcasts to (out, in); float32
    largest: int,  # symbols are clipped to ±largest
) -> Tensor:  # (out, in) int32
    """The symbols of `weight`."""
    steps = scales[:, None] if scales.ndim == 1 else scales
    return (weight / steps).round().clamp(-largest, largest).int()
