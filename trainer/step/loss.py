"""The objective of training where it is not plain cross-entropy: the recipe's table `loss`.

The metric stays plain nats whatever is minimised, so runs with and without these settings can be compared. With every
setting off nothing here runs. With n tokens in a step, logits c of a position after the soft-cap, its target y and its
weight w, the objective is

    Σ w · (f · s + z_loss · logsumexp(c)² + logit_penalty · mean(c²)) / n

    s = (1 − ε) · nats + ε · (logsumexp(c) − mean(c))    ε = label_smoothing
    f = (1 − exp(−nats)) ** γ, where γ goes from 0 to focal_gamma over focal_gamma_ramp
    w = 0 of ignored ids, else 1 + r · (class weight − 1), where r goes from 0 to 1 over class_weight_ramp

plus head_diversity times the mean squared cosine between the query projections of two heads of a layer, and
future_weight times the nats of heads that predict later tokens (`trainer.step.future_heads`). It divides by
all tokens of the step, not by Σw: so it is the same however a step is cut into micro-batches and ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from pgolf_post.settings import Settings

TokenClass = Literal[  # as in pgolf_post.score.breakdown.token_text
    "word start", "continuation", "punctuation", "digits", "white space", "byte fallback", "BOS", "control"
]
SMALLEST = 1e-12  # of 1 − p, whose power below 1 has no slope at 0


class LossSettings(Settings):
    """Terms that training minimises beside or instead of plain nats. All are off by default."""

    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="share of the target's probability that all tokens of the vocabulary share"
    )
    z_loss: float = Field(0.0, ge=0, description="weight of logsumexp(logits)², per token; PaLM has 1e-4")
    ignore_ids: tuple[int, ...] = Field((), description="targets that are not trained on; the metric has them still")
    class_weights: Mapping[TokenClass, float] = Field(
        {}, description='weights of targets by their class, as `eval --breakdown` names it: {"word start" = 1.5}'
    )
    class_weight_ramp: tuple[float, float] = Field(
        (0.0, 0.0), description="progress at which weights begin to leave 1 and at which they are reached"
    )
    focal_gamma: float = Field(0.0, ge=0, description="power of 1 − p(target) that multiplies a token's loss")
    focal_gamma_ramp: tuple[float, float] = Field(
        (0.0, 0.0), description="progress at which the power begins to leave 0 and at which it is focal_gamma"
    )
    future_tokens: int = Field(
        0,
        ge=0,
        le=16,
        description="later tokens that heads of their own predict while training",
    )
    future_weight: float = Field(0.2, gt=0, description="weight of those heads' mean nats")
    logit_penalty: float = Field(0.0, ge=0, description="weight of the mean square of soft-capped logits, per token")
    head_diversity: float = Field(
        0.0, ge=0, description="weight of the mean squared cosine between two heads' query projections in a layer"
    )

    @model_validator(mode="after")
    def _acts(self) -> LossSettings:
        negative = [token for token in self.ignore_ids if token < 0]
        if negative:
            raise ValueError(f"ignore_ids count from 0, got {negative}")
        if len(set(self.ignore_ids)) < len(self.ignore_ids):
            raise ValueError(f"ignore_ids {list(self.ignore_ids)} names one twice")
        wrong = {name: weight for name, weight in self.class_weights.items() if weight < 0}
        if wrong:
            raise ValueError(f"class_weights must be at least 0, got {wrong}")
        for key, ramped in (("class_weight_ramp", "class_weights"), ("focal_gamma_ramp", "focal_gamma")):
            start, end = getattr(self, key)
            if not 0 <= start <= end <= 1:
                raise ValueError(f"{key} must ascend within 0 and 1, got {[start, end]}")
            if end and not getattr(self, ramped):
                raise ValueError(f"{key} {[start, end]} acts only with {ramped}")
        if not self.future_tokens and self.future_weight != type(self).model_fields["future_weight"].default:
            raise ValueError(f"future_weight {self.future_weight:g} acts only with future_tokens")
        return self

    @property
    def is_on(self) -> bool:
        """Whether training minimises anything but plain nats."""
        return bool(self.settings_on())

    def settings_on(self) -> dict[str, Any]:
        """Return the settings that are not at their defaults, as plain values."""
        return self.model_dump(mode="json", exclude_defaults=True)


def share_of(ramp: tuple[float, float], at: float) -> float:
    """Return how much of a ramp is done at progress `at`, in [0, 1]; one whose ends meet is a jump."""
    start, end = ramp
    if at >= end:
        return 1.0
    return 0.0 if at <= start else (at - start) / (end - start)


def in_words(settings: LossSettings) -> str:
    """Return in one line what is minimised."""
    return ", ".join(f"{key} {value}" for key, value in settings.settings_on().items())


def objective(
    settings: LossSettings,
    logits: Tensor,  # (tokens, vocab_size), soft-capped
    targets: Tensor,  # (tokens,) int64
    weights: Tensor | None,  # (vocab_size,); None = all 1
    gamma: Tensor | None = None,  # (), in place of focal_gamma where that has a ramp
) -> Tensor:  # (2,): the objective without its terms of the model, then plain nats, both means over tokens
    """Return what the settings minimise over these tokens, and the plain nats of the same tokens.

    Sources: label smoothing, Szegedy et al., arXiv:1512.00567; z-loss, Chowdhery et al., arXiv:2204.02311; focal loss,
    Lin et al., arXiv:1708.02002.
    """
    nats = F.cross_entropy(logits, targets, reduction="none")
    cost = nats
    if settings.label_smoothing or settings.z_loss:
        total = logits.logsumexp(-1)
    if settings.label_smoothing:
        share = settings.label_smoothing
        cost = (1 - share) * cost + share * (total - logits.mean(-1))
    if settings.focal_gamma:
        power = settings.focal_gamma if gamma is None else gamma.to(nats.dtype)
        cost = (-torch.expm1(-nats)).clamp(min=SMALLEST) ** power * cost
    if settings.z_loss:
        cost = cost + settings.z_loss * total.square()
    if settings.logit_penalty:
        cost = cost + settings.logit_penalty * logits.square().mean(-1)
    if weights is not None:
        cost = cost * weights.to(cost.dtype)[targets]
    return torch.stack([cost.mean(), nats.detach().mean()])
