"""The norm of every layer: RMSNorm without a weight. Heads that stand beside positions have their gain in it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NORM_EPS = torch.finfo(torch.float32).eps  # of the challenge's RMSNorm in float32; not negligible at initialisation


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of positions, logits and sums: float32 for narrower types, float64 for itself."""
    return torch.promote_types(dtype, torch.float32)


def rms_norm(x: Tensor) -> Tensor:
    """Return x normalised by its root mean square over the last dimension, without a weight, in x's dtype.

    CUDA's autocast would widen a bfloat16 x (from torch 2.12 on), the CPU's does not: outside it both do the same.
    """
    if x.is_cuda and torch.is_autocast_enabled("cuda"):
        with torch.autocast("cuda", enabled=False):
            return F.rms_norm(x, (x.size(-1),), eps=NORM_EPS)
    return F.rms_norm(x, (x.size(-1),), eps=NORM_EPS)


def scaled_norm(
    x: Tensor,  # (…, heads, head_dim)
    gains: Tensor,  # (…, heads, 1)
) -> Tensor:  # x's shape and dtype
    """Return `rms_norm` of each head times its gain, rounded once.

    A gain is part of the one factor that a head has at a position: its gradient sums numbers of heads, not of channels.
    """
    wide = x.to(at_least_float32(x.dtype))
    factors = torch.rsqrt(wide.square().mean(-1, keepdim=True) + NORM_EPS) * gains.to(wide.dtype)
    return (wide * factors).to(x.dtype)
