"""Settings of the optimizer and of the averages that follow its steps: a recipe's table `optim`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from pgolf_post.average.profiles import gamma_of
from pgolf_post.errors import SettingsError
from pgolf_post.settings import Settings
from trainer.optim.muon import NewtonSchulz, NewtonSchulzDtype
from trainer.optim.tensor_groups import TensorGroupSettings
from trainer.schedule.functions import cyclic_momentum, momentum_at
from trainer.schedule.points import LARGEST_RATE


class OptimSettings(Settings):
    """Settings of Muon, AdamW and the averages. Learning rates are peaks; the schedule multiplies them."""

    matrix_lr: float = Field(0.02, gt=0, le=LARGEST_RATE, description="learning rate of matrices, by Muon")
    matrix_weight_decay: float = Field(0.085, ge=0, description="weight decay of matrices, times their learning rate")
    momentum: float = Field(0.95, ge=0, lt=1, description="Muon's momentum after its warm-up")
    momentum_start: float = Field(0.85, ge=0, lt=1, description="Muon's momentum at the first step")
    momentum_warmup_steps: int = Field(500, ge=0, description="steps over which Muon's momentum rises linearly")
    newton_schulz: NewtonSchulz = Field("polar_express", description="coefficients of Muon's orthogonalisation")
    newton_schulz_steps: int = Field(
        5, ge=1, le=20, description="iterations of Muon's orthogonalisation; polar_express has at most 5"
    )
    newton_schulz_dtype: NewtonSchulzDtype = Field(
        "auto", description="dtype of Muon's orthogonalisation and of its updates' transfers; auto = bf16 on a GPU"
    )
    row_normalize: bool = Field(True, description="normalise each row of Muon's update before orthogonalisation")
    embed_lr: float = Field(0.03, gt=0, le=LARGEST_RATE, description="learning rate of embeddings, by AdamW")
    embed_weight_decay: float = Field(0.085, ge=0, description="weight decay of embeddings, times their learning rate")
    head_lr: float = Field(
        0.008, gt=0, le=LARGEST_RATE, description="learning rate of an untied lm_head, by AdamW, without decay"
    )
    scalar_lr: float = Field(
        0.02, gt=0, le=LARGEST_RATE, description="learning rate of non-matrix parameters, by AdamW"
    )
    scalar_weight_decay: float = Field(
        0.02, ge=0, description="weight decay of non-matrix parameters, times their learning rate"
    )
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's decay of the mean of gradients, per step")
    adam_beta2: float = Field(0.95, ge=0, lt=1, description="AdamW's decay of the mean of squares, per step")
    adam_eps: float = Field(1e-8, gt=0, description="AdamW's addition to the root of the mean of squares")
    grad_clip: float = Field(0.3, ge=0, description="largest global gradient norm; 0 = no clipping")
    clip_norm_of: Literal["all", "each"] = Field(
        "all",
        description="all = clip the sum of all ranks' gradients; each = clip each rank's own before it is sent, as the "
        "public record scripts do, so that no rank waits for the norm of all",
    )
    ema_decay: float = Field(
        0.997, ge=0, lt=1, description="EMA decay per step, whatever ema_every is; 0 = keep no EMA"
    )
    ema_every: int = Field(1, ge=1, description="steps between EMA updates, each with decay ** ema_every")
    swa_start: float | None = Field(None, ge=0, lt=1, description="progress from which a running mean is kept")
    swa_every: int = Field(10, ge=1, description="steps between models that enter the running mean")
    power_ema_sigmas: tuple[float, ...] = Field(
        (), description="relative widths of power-function averages to snapshot for post-hoc EMA: 0.05, 0.10"
    )
    power_ema_snapshots: int = Field(
        16, ge=2, description="snapshots of each average, evenly spaced over the run, beside one at each checkpoint"
    )
    momentum_cycle_steps: int | None = Field(
        None, ge=2, description="period, in steps, of a momentum that cycles after its warm-up"
    )
    momentum_cycle_low: float = Field(0.85, ge=0, lt=1, description="momentum half a cycle after its warm-up")
    momentum_cycle_high: float = Field(
        0.95, ge=0, lt=1, description="momentum where its warm-up ends and each cycle begins"
    )
    groups: tuple[TensorGroupSettings, ...] = Field(
        (), description="tensors that step in a way of their own, one table [[optim.groups]] each"
    )

    @model_validator(mode="after")
    def _acts(self) -> OptimSettings:
        if self.momentum_cycle_low > self.momentum_cycle_high:
            raise ValueError(
                f"momentum_cycle_low {self.momentum_cycle_low} exceeds momentum_cycle_high {self.momentum_cycle_high}"
            )
        if self.newton_schulz == "polar_express" and self.newton_schulz_steps > 5:
            raise ValueError(
                f"newton_schulz_steps {self.newton_schulz_steps}: polar_express has coefficients for 5 iterations, "
                'newton_schulz = "classic" for any number'
            )
        for key, needed, acts in (
            ("clip_norm_of", "grad_clip above 0", bool(self.grad_clip)),
            ("ema_every", "ema_decay above 0", bool(self.ema_decay)),
            ("swa_every", "swa_start", self.swa_start is not None),
            ("power_ema_snapshots", "power_ema_sigmas", bool(self.power_ema_sigmas)),
            ("momentum_cycle_low", "momentum_cycle_steps", self.momentum_cycle_steps is not None),
            ("momentum_cycle_high", "momentum_cycle_steps", self.momentum_cycle_steps is not None),
        ):
            value = getattr(self, key)
            if not acts and value != type(self).model_fields[key].default:
                raise ValueError(f"{key} {value} acts only with {needed}")
        if len(set(self.power_ema_sigmas)) < len(self.power_ema_sigmas):
            raise ValueError(f"power_ema_sigmas {self.power_ema_sigmas} names one twice")
        for sigma in self.power_ema_sigmas:
            try:
                gamma_of(sigma)
            except SettingsError as error:
                raise ValueError(f"power_ema_sigmas: {error}") from None
        return self

    def momentum_for(self, step: int) -> float:
        """Return Muon's momentum at optimizer step `step` (counted from 0): warm-up, then constant or cyclic."""
        cycle, warmup = self.momentum_cycle_steps, self.momentum_warmup_steps
        peak = self.momentum_cycle_high if cycle else self.momentum
        if cycle is None or step < warmup:
            return momentum_at(step, self.momentum_start, peak, warmup)
        return cyclic_momentum(step - warmup, self.momentum_cycle_low, peak, cycle)

    def peak_learning_rates(self) -> dict[str, float]:
        """Return group → the learning rate that the schedule multiplies."""
        return {"matrix": self.matrix_lr, "embed": self.embed_lr, "head": self.head_lr, "scalar": self.scalar_lr}

    def peak_weight_decays(self) -> dict[str, float]:
        """Return group → the weight decay that the schedule multiplies; an untied head has none."""
        embed, scalar = self.embed_weight_decay, self.scalar_weight_decay
        return {"matrix": self.matrix_weight_decay, "embed": embed, "head": 0.0, "scalar": scalar}
