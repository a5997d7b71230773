"""The type of a forward pass's matrix products: the weights' own float32, or bfloat16 under torch's autocast.

bfloat16 is several times faster on a GPU and keeps half the bytes of activations, and it gives other numbers. So every
stage that can compute in it has a setting, which is part of its result's identity; docs/results/gpu.md says how far the
numbers are apart.
"""

from __future__ import annotations

import contextlib

import torch


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """Return the autocast type: bfloat16 for "bf16", or for "auto" on a GPU; None for float32."""
    wanted = precision == "bf16" or (precision == "auto" and device.type == "cuda")
    return torch.bfloat16 if wanted else None


def autocast_to(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[object]:
    """Return a context in which products are computed in `dtype`; None changes nothing."""
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype)
