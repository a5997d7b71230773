"""Weights that come back: after a run they are what they were before it, bit for bit."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pgolf_post.base.ranks import Ranks
from pgolf_post.errors import VerificationError


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and buffer by name, those that are not saved included."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def weights_sha256(module: nn.Module) -> str:
    """Return the sha256 of the bytes of every parameter and buffer."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors_of(module).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def require_equal_weights(module: nn.Module, ranks: Ranks) -> None:
    """Raise VerificationError unless every rank ends with the same weights, bit for bit."""
    if ranks.world_size == 1:
        return
    own = weights_sha256(module)
    main = ranks.main_says(own)
    if own != main:
        raise VerificationError(
            f"rank {ranks.rank} ends test-time training with weights {own[:12]}, rank 0 with {main[:12]}"
        )


@contextmanager
def restored(module: nn.Module) -> Iterator[None]:
    """Put weights, gradients' switches and mode back on the way out, however that is.

    Raises VerificationError if the weights do not come out the same.
    """
    before = weights_sha256(module)
    copies = {name: tensor.detach().clone() for name, tensor in tensors_of(module).items()}
    switches = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
    training = module.training
    try:
        yield
    finally:
        with torch.no_grad():
            for name, tensor in tensors_of(module).items():
                tensor.copy_(copies[name])
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(switches[name])
            parameter.grad = None
        module.train(training)
    if weights_sha256(module) != before:
        raise VerificationError("test-time training left other weights behind than it found")
