"""Copies from the host to a GPU that wait for nothing.

`tensor.to("cuda")` waits until everything queued on the GPU is done, and so does `non_blocking=True` from pageable or
strided memory. Only contiguous page-locked memory is copied while the GPU works; torch keeps it until the copy is made.
"""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a copy on the device; to a GPU through pinned memory, without waiting for what is queued there."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return page_locked(tensor).to(device, non_blocking=True)
    return tensor.to(device)


def page_locked(tensor: Tensor) -> Tensor:
    """Return a contiguous copy in page-locked memory, or the tensor where it is one: a strided one is not copied
    asynchronously, whatever is asked for.
    """
    if tensor.is_pinned() and tensor.is_contiguous():
        return tensor
    return tensor.contiguous().pin_memory()
