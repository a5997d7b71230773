"""Averages that follow the raw weights, in float32 (or better) and off the gradient's path.

An exponential one (EMA) and, from a share of the run on, a running equal-weight mean (SWA, Izmailov et al. 2018).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def _wide_copy(parameter: Tensor) -> Tensor:
    """A copy in float32, or float64 where the weights are."""
    return parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32), copy=True)


class EMA:
    """Float32 exponential moving average of the weights, decay min(ema_decay, (1+t)/(10+t)) per step at step t.

    Updated every n steps with that decay to the power n, its length in steps stays what ema_decay says.
    """

    def __init__(self, model: nn.Module, decay: float, every: int = 1) -> None:
        self.decay, self.every = decay, every
        self.parameters = dict(model.named_parameters())
        self.shadow = {name: _wide_copy(parameter) for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Fold in the weights after optimizer step `step` (counted from 1), if it is one of every n."""
        if step % self.every:
            return
        decay = min(self.decay, (1 + step) / (10 + step)) ** self.every
        torch._foreach_lerp_(list(self.shadow.values()), list(self.parameters.values()), 1 - decay)


class RunningMean:
    """Float32 mean of `count` models, each with the same weight: SWA without keeping the models."""

    def __init__(self, model: nn.Module, every: int) -> None:
        self.every, self.count = every, 0
        self.parameters = dict(model.named_parameters())
        self.mean: dict[str, Tensor] = {}  # empty until the first model enters

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Let the weights after optimizer step `step` (counted from 1) enter, if it is one of every n."""
        if step % self.every:
            return
        self.count += 1
        if self.count == 1:
            self.mean = {name: _wide_copy(parameter) for name, parameter in self.parameters.items()}
        else:
            torch._foreach_lerp_(list(self.mean.values()), list(self.parameters.values()), 1 / self.count)
