"""Averages that follow the raw weights, in float32 (or better) and off the gradient's path.

An exponential one (EMA); from a share of the run on, a running equal-weight mean (SWA, Izmailov et al. 2018); and
power-function ones (Karras et al. 2024, arXiv 2312.02696, section 3), whose snapshots along the run let any other EMA
be synthesised after it (`pgolf_post.average.posthoc`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pgolf_post.average.profiles import gamma_of, power_beta
from pgolf_post.checkpoint import ViewName
from pgolf_post.errors import NotFoundError
from trainer.optim.settings import OptimSettings


def _wide_copy(parameter: Tensor) -> Tensor:
    """Return a copy in float32, or in float64 where the weights are."""
    return parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32), copy=True)


def warmup_decay(step: int) -> float:
    """Return the largest decay that an EMA has at a step: low at first, so that the start of the run is soon gone."""
    return (1 + step) / (10 + step)


def decay_acts_from(decay: float, every: int = 1) -> int:
    """Return the first step at which an EMA updated every n steps has this decay, and not its warm-up's."""
    step = math.ceil((10 * decay - 1) / (1 - decay) - 1e-6)  # at 0.995 exactly 1,790, whatever floats make of it
    return every * max(1, math.ceil(step / every))


class EMA:
    """Float32 exponential moving average of the weights, decay min(ema_decay, (1+t)/(10+t)) per step at step t.

    With ema_every n it is updated every n steps with that decay to the power n, so its length in steps is the same.
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
        decay = min(self.decay, warmup_decay(step)) ** self.every
        torch._foreach_lerp_(list(self.shadow.values()), list(self.parameters.values()), 1 - decay)

    def load(self, shadow: Mapping[str, Tensor]) -> None:
        """Go on from a checkpoint's EMA view."""
        for name, tensor in self.shadow.items():
            tensor.copy_(shadow[name])


class RunningMean:
    """Float32 mean of `count` models, each with the same weight: SWA without keeping the models."""

    def __init__(self, model: nn.Module, every: int) -> None:
        self.every, self.count = every, 0
        self.parameters = dict(model.named_parameters())
        self.mean: dict[str, Tensor] = {}  # empty until the first model enters

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Add the weights after optimizer step `step` (counted from 1) to the mean, if it is one of every n."""
        if step % self.every:
            return
        self.count += 1
        if self.count == 1:
            self.mean = {name: _wide_copy(parameter) for name, parameter in self.parameters.items()}
        else:
            torch._foreach_lerp_(list(self.mean.values()), list(self.parameters.values()), 1 / self.count)

    def load(self, mean: Mapping[str, Tensor], count: int) -> None:
        """Go on from a checkpoint's SWA view, the mean of `count` models."""
        self.count = count
        self.mean = {name: mean[name].to(old.device, copy=True) for name, old in self.parameters.items()}


class PowerEMA:
    """Power-function averages, one for each relative width σ: θ̂ ← β(t) θ̂ + (1 - β(t)) θ, β(t) = (1 - 1/t)^(γ+1).

    The first step's weights replace what was there, so the start of the run leaves nothing behind.
    """

    def __init__(self, model: nn.Module, sigmas: Sequence[float]) -> None:
        self.gammas = {sigma: gamma_of(sigma) for sigma in sigmas}
        self.parameters = dict(model.named_parameters())
        self.tracks = {sigma: {name: _wide_copy(p) for name, p in self.parameters.items()} for sigma in sigmas}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Fold in the weights after optimizer step `step` (counted from 1): every step, in order."""
        for sigma, track in self.tracks.items():
            share = 1 - power_beta(self.gammas[sigma], step)
            torch._foreach_lerp_(list(track.values()), list(self.parameters.values()), share)

    def state(self) -> dict[str, Tensor]:
        """Return every average as named tensors: power_ema[SIGMA].NAME."""
        return {f"{_key(sigma)}.{name}": t for sigma, track in self.tracks.items() for name, t in track.items()}

    def load_state(self, state: Mapping[str, Tensor], source: str) -> None:
        """Restore what `state` returned. Raises NotFoundError naming a track that is not there."""
        for sigma, track in self.tracks.items():
            absent = [name for name in track if f"{_key(sigma)}.{name}" not in state]
            if absent:
                raise NotFoundError(
                    f"{source} holds no power-function EMA of sigma {sigma:g}; the track cannot be taken up",
                    hint="resume with the sigmas of the run, or without: --set optim.power_ema_sigmas=[]",
                )
            for name, tensor in track.items():
                tensor.copy_(state[f"{_key(sigma)}.{name}"])


def _key(sigma: float) -> str:
    return f"power_ema[{sigma:g}]"


@dataclass
class Averages:
    """The averages that a run keeps beside its raw weights; None where the recipe has none of a kind."""

    ema: EMA | None
    swa: RunningMean | None
    power_ema: PowerEMA | None
    swa_start: float | None  # progress from which the running mean is kept

    @classmethod
    def begin(cls, model: nn.Module, settings: OptimSettings) -> Averages:
        """Return the averages of a new run."""
        return cls(
            ema=EMA(model, settings.ema_decay, settings.ema_every) if settings.ema_decay else None,
            swa=RunningMean(model, settings.swa_every) if settings.swa_start is not None else None,
            power_ema=PowerEMA(model, settings.power_ema_sigmas) if settings.power_ema_sigmas else None,
            swa_start=settings.swa_start,
        )

    def update(self, step: int, at: float) -> None:
        """Fold in the weights after optimizer step `step` (counted from 1), which began at progress `at`."""
        if self.ema:
            self.ema.update(step)
        if self.swa and self.swa_start is not None and at >= self.swa_start:
            self.swa.update(step)
        if self.power_ema:
            self.power_ema.update(step)

    def views(self, raw: Mapping[str, Tensor]) -> dict[ViewName, dict[str, Tensor]]:
        """Return a checkpoint's views: the raw weights, and each average with the raw weights' buffers, if any."""
        views: dict[ViewName, dict[str, Tensor]] = {"raw": dict(raw)}
        if self.ema:
            views["ema"] = {**raw, **self.ema.shadow}
        if self.swa and self.swa.count:
            views["swa"] = {**raw, **self.swa.mean}
        return views


def snapshots_due(before: float, after: float, num_snapshots: int) -> bool:
    """Return whether a step that took progress from `before` to `after` passed one of n evenly spaced moments.

    The moments are 1/n, 2/n, … 1 of the run, whatever limits it; a step that passes several has one snapshot.
    """
    passed_before, passed = (int(at * num_snapshots + 1e-9) for at in (before, after))
    return passed > passed_before
