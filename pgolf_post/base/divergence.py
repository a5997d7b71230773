"""How far a model's predictions are from another's: what fit measures, and distillation and fine-tuning lower."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def token_divergences(own: Tensor, other: Tensor) -> Tensor:  # logits (…, vocab) of both → (…,) nats
    """KL(own ‖ other) at every token, in float32."""
    return divergences_of(F.log_softmax(own.float(), -1), F.log_softmax(other.float(), -1))


def divergences_of(own: Tensor, other: Tensor) -> Tensor:  # log probabilities (…, vocab) of both → (…,) nats
    """The same, of logarithms of probabilities."""
    found: Tensor = (own.exp() * (own - other)).sum(-1)
    return found
