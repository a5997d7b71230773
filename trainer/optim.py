"""Muon for matrices, AdamW for the rest, one step over both.

Muon (Jordan et al. 2024) replaces a matrix's momentum by its nearest orthogonal matrix, computed by five Newton-Schulz
iterations; matrices of equal shape are stacked and iterated together. Coefficients: Jordan's classic quintic, or Polar
Express (Amsel et al. 2025) as the record scripts use it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from pgolf_post.ema_profiles import gamma_of
from pgolf_post.errors import SettingsError
from pgolf_post.settings import Settings
from trainer.distributed import ALONE, Ranks
from trainer.schedule import cyclic_momentum, momentum_at

NewtonSchulz = Literal["classic", "polar_express"]

COEFFICIENTS: dict[NewtonSchulz, tuple[tuple[float, float, float], ...]] = {
    "classic": ((3.4445, -4.7750, 2.0315),) * 5,
    "polar_express": (
        (8.156555, -22.483293, 15.878769),
        (4.042930, -2.808917, 0.500018),
        (3.891668, -2.772484, 0.506065),
        (3.285754, -2.368129, 0.464490),
        (2.346541, -1.709783, 0.423236),
    ),
}


class OptimSettings(Settings):
    """Learning rates are peaks; the schedule multiplies them."""

    matrix_lr: float = Field(0.02, gt=0)
    matrix_weight_decay: float = Field(0.085, ge=0)
    momentum: float = Field(0.95, ge=0, lt=1)
    momentum_start: float = Field(0.85, ge=0, lt=1)
    momentum_warmup_steps: int = Field(500, ge=0)
    newton_schulz: NewtonSchulz = "polar_express"
    row_normalize: bool = True
    embed_lr: float = Field(0.03, gt=0)
    embed_weight_decay: float = Field(0.085, ge=0)
    head_lr: float = Field(0.008, gt=0, description="an untied lm_head")
    scalar_lr: float = Field(0.02, gt=0)
    scalar_weight_decay: float = Field(0.02, ge=0)
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.95, ge=0, lt=1)
    adam_eps: float = Field(1e-8, gt=0)
    grad_clip: float = Field(0.3, ge=0, description="largest global gradient norm; 0 = no clipping")
    ema_decay: float = Field(0.997, ge=0, lt=1, description="per step, whatever ema_every is; 0 = keep no EMA")
    ema_every: int = Field(1, ge=1, description="steps between EMA updates, each with decay ** ema_every")
    swa_start: float | None = Field(None, ge=0, lt=1, description="progress from which a running mean is kept")
    swa_every: int = Field(10, ge=1, description="steps between models that enter the running mean")
    power_ema_sigmas: tuple[float, ...] = Field(
        (), description="relative widths of power-function averages to snapshot for post-hoc EMA: 0.05, 0.10"
    )
    power_ema_snapshots: int = Field(
        16, ge=2, description="of each, evenly spaced over the run; beside one at each checkpoint"
    )
    momentum_cycle_steps: int | None = Field(None, ge=2, description="period of a momentum that cycles after warm-up")
    momentum_cycle_low: float = Field(0.85, ge=0, lt=1)
    momentum_cycle_high: float = Field(0.95, ge=0, lt=1, description="where warm-up ends and each cycle begins")

    @model_validator(mode="after")
    def _acts(self) -> OptimSettings:
        if self.momentum_cycle_low > self.momentum_cycle_high:
            raise ValueError(
                f"momentum_cycle_low {self.momentum_cycle_low} exceeds momentum_cycle_high {self.momentum_cycle_high}"
            )
        if self.ema_every > 1 and not self.ema_decay:
            raise ValueError(f"ema_every {self.ema_every} acts only with ema_decay above 0")
        if len(set(self.power_ema_sigmas)) < len(self.power_ema_sigmas):
            raise ValueError(f"power_ema_sigmas {self.power_ema_sigmas} names one twice")
        for sigma in self.power_ema_sigmas:
            try:
                gamma_of(sigma)
            except SettingsError as error:
                raise ValueError(f"power_ema_sigmas: {error}") from None
        return self

    def momentum_for(self, step: int) -> float:
        """Muon's momentum at optimizer step `step` (counted from 0): warm-up, then constant or cyclic."""
        cycle, warmup = self.momentum_cycle_steps, self.momentum_warmup_steps
        peak = self.momentum_cycle_high if cycle else self.momentum
        if cycle is None or step < warmup:
            return momentum_at(step, self.momentum_start, peak, warmup)
        return cyclic_momentum(step - warmup, self.momentum_cycle_low, peak, cycle)

    def peak_learning_rates(self) -> dict[str, float]:
        """Group → the learning rate that the schedule multiplies."""
        return {"matrix": self.matrix_lr, "embed": self.embed_lr, "head": self.head_lr, "scalar": self.scalar_lr}


def orthogonalize(
    updates: Tensor,  # (n, rows, cols)
    scheme: NewtonSchulz,
) -> Tensor:  # (n, rows, cols), singular values near 1
    """Five Newton-Schulz iterations on each matrix, in its smaller dimension."""
    transposed = updates.size(-2) > updates.size(-1)
    x = updates.mT if transposed else updates
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.01 + 1e-7)
    for a, b, c in COEFFICIENTS[scheme]:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if transposed else x


def muon_updates(
    gradients: Tensor,  # (n, rows, cols)
    momenta: Tensor,  # (n, rows, cols)
    momentum: float,
    settings: OptimSettings,
    ranks: Ranks = ALONE,
) -> Tensor:  # (n, rows, cols)
    """Nesterov momentum, row normalisation, orthogonalisation, scale √max(1, rows/cols). Momenta change in place.

    Ranks share out the orthogonalisation, matrix by matrix; the rest is cheap and done by all.
    """
    momenta.mul_(momentum).add_(gradients)
    update = gradients + momentum * momenta
    if settings.row_normalize:
        update = update / (update.norm(dim=-1, keepdim=True) + 1e-7)
    rows, cols = update.shape[-2:]
    orthogonal = ranks.map_rows(lambda some: orthogonalize(some, settings.newton_schulz), update)
    return orthogonal * max(1.0, rows / cols) ** 0.5


def group_of(name: str, parameter: Tensor) -> str:
    """The optimizer group of a parameter: matrix, embed, head or scalar."""
    if name == "tok_emb.weight":
        return "embed"
    if name == "lm_head.weight":
        return "head"
    if name.endswith(".weight") and parameter.ndim == 2:
        return "matrix"
    return "scalar"


class Optimizer:
    """Muon and AdamW over a model's parameters. State is a flat dict of named tensors, saved as one file."""

    def __init__(self, model: nn.Module, settings: OptimSettings, ranks: Ranks = ALONE) -> None:
        self.settings, self.ranks = settings, ranks
        self.parameters = dict(model.named_parameters())
        self.matrices: dict[tuple[int, ...], list[str]] = defaultdict(list)  # equal shapes step together
        self.adam_names: dict[str, list[str]] = defaultdict(list)  # group → parameter names
        tables = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
        for name, parameter in self.parameters.items():
            group = "embed" if name in tables else group_of(name, parameter)
            if group == "matrix":
                self.matrices[tuple(parameter.shape)].append(name)
            else:
                self.adam_names[group].append(name)
        self.momenta = {
            shape: torch.stack([torch.zeros_like(self.parameters[name]) for name in names])
            for shape, names in self.matrices.items()
        }
        betas = (settings.adam_beta1, settings.adam_beta2)
        groups = [self._adam_group(group, names) for group, names in self.adam_names.items()]
        self.adam = torch.optim.AdamW(groups, betas=betas, eps=settings.adam_eps, foreach=True)

    def _adam_group(self, group: str, names: list[str]) -> dict[str, Any]:
        """AdamW's settings for one group; `peak_lr` is what the schedule multiplies."""
        settings = self.settings
        lr, weight_decay = {
            "embed": (settings.embed_lr, settings.embed_weight_decay),
            "head": (settings.head_lr, 0.0),
            "scalar": (settings.scalar_lr, settings.scalar_weight_decay),
        }[group]
        parameters = [self.parameters[name] for name in names]
        decays = {"weight_decay": weight_decay, "peak_weight_decay": weight_decay}
        return {"params": parameters, "lr": lr, "peak_lr": lr, **decays}

    def groups(self) -> list[str]:
        """The groups that this model has, matrices first."""
        return ["matrix"] * bool(self.matrices) + list(self.adam_names)

    def learning_rates(self, lr_multiplier: float) -> dict[str, float]:
        """Each group's learning rate under a multiplier."""
        peaks = self.settings.peak_learning_rates()
        return {group: peaks[group] * lr_multiplier for group in self.groups()}

    @torch.no_grad()
    def step(self, lr_multiplier: float, momentum: float, weight_decay_multiplier: float = 1.0) -> float:
        """Clip, update every parameter, clear gradients. Returns the gradient norm before clipping."""
        limit = self.settings.grad_clip or float("inf")
        norm = float(nn.utils.clip_grad_norm_(self.parameters.values(), limit))
        for group in self.adam.param_groups:
            group["lr"] = group["peak_lr"] * lr_multiplier
            group["weight_decay"] = group["peak_weight_decay"] * weight_decay_multiplier
        self.adam.step()
        lr, decay = self.settings.matrix_lr * lr_multiplier, self.settings.matrix_weight_decay * weight_decay_multiplier
        for shape, names in self.matrices.items():
            self._step_matrices(shape, names, lr, decay, momentum)
        for parameter in self.parameters.values():
            parameter.grad = None
        return norm

    def _step_matrices(
        self, shape: tuple[int, ...], names: list[str], lr: float, weight_decay: float, momentum: float
    ) -> None:
        """One Muon step with decoupled weight decay on the matrices of one shape that this step's graph used."""
        used = [index for index, name in enumerate(names) if self.parameters[name].grad is not None]
        if not used:
            return
        gradients = torch.stack([_gradient(self.parameters[names[index]]) for index in used])
        whole = len(used) == len(names)
        momenta = self.momenta[shape] if whole else self.momenta[shape][used]
        updates = muon_updates(gradients, momenta, momentum, self.settings, self.ranks)
        if not whole:
            self.momenta[shape][used] = momenta
        for index, update in zip(used, updates, strict=True):
            self.parameters[names[index]].mul_(1 - lr * weight_decay).add_(update, alpha=-lr)

    def state(self) -> dict[str, Tensor]:
        """Every moment as a named tensor: momentum.NAME, exp_avg.NAME, exp_avg_sq.NAME, adam_step.NAME."""
        state = {}
        for shape, names in self.matrices.items():
            state.update({f"momentum.{name}": self.momenta[shape][i] for i, name in enumerate(names)})
        for name in self._adam_parameters():
            moments = self.adam.state.get(self.parameters[name], {})
            state.update({f"{key.replace('step', 'adam_step')}.{name}": value for key, value in moments.items()})
        return state

    def load_state(self, state: Mapping[str, Tensor], source: str) -> None:
        """Restore what `state` returned. Raises SettingsError listing tensors that are missing."""
        wanted = [f"momentum.{name}" for names in self.matrices.values() for name in names]
        missing = [key for key in wanted if key not in state]
        if missing:
            raise SettingsError(f"{source}: optimizer state lacks {', '.join(missing)}")
        for shape, names in self.matrices.items():
            stacked = torch.stack([state[f"momentum.{name}"] for name in names])
            self.momenta[shape] = stacked.to(self.momenta[shape].device)
        for name in self._adam_parameters():
            if f"exp_avg.{name}" in state:
                device = self.parameters[name].device
                self.adam.state[self.parameters[name]] = {
                    "step": state[f"adam_step.{name}"].clone(),  # a number: AdamW keeps it on the CPU
                    "exp_avg": state[f"exp_avg.{name}"].to(device, copy=True),
                    "exp_avg_sq": state[f"exp_avg_sq.{name}"].to(device, copy=True),
                }

    def _adam_parameters(self) -> Iterable[str]:
        return (name for names in self.adam_names.values() for name in names)


def _gradient(parameter: Tensor) -> Tensor:
    """A gradient that is known to be there."""
    assert parameter.grad is not None
    return parameter.grad
