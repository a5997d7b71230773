"""KL divergence between two models' predictions: what `fit` measures, and distillation and fine-tuning lower."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def token_divergences(reference: Tensor, other: Tensor) -> Tensor:  # logits (…, vocab) of both → (…,) nats
    """Return KL(reference ‖ other) at every token, in float32."""
    return divergences_of(F.log_softmax(reference.float(), -1), F.log_softmax(other.float(), -1))


def divergences_of(reference: Tensor, other: Tensor) -> Tensor:  # log probabilities (…, vocab) of both → (…,) nats
    """Return KL(reference ‖ other) at every token from the logarithms of both models' probabilities."""
    return torch.sum(reference.exp() * (reference - other), dim=-1)
