"""Round to nearest: each weight to the closest symbol of its row's grid. What GPTQ becomes when H = I."""

from __future__ import annotations

import torch
from torch import Tensor


def round_to_nearest(
    weight: Tensor,  # (out, in) float32
    scales: Tensor,  # (out,) float32
    largest: int,  # symbols are clipped to ±largest
) -> Tensor:  # (out, in) int8
    """The symbols of `weight`."""
    return torch.clamp(torch.round(weight / scales[:, None]), -largest, largest).to(torch.int8)
