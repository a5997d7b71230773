"""κ: by how much the quadratic model of the loss is off, measured for each role.

The model of sensitivity.py leaves out what couples tensors, tokens and rows. So each role is quantized alone, with
steps coarse enough to be seen, and the loss it costs on training text (its even part, see probe.py) is divided by what
was predicted. Measurements are noisy, so κ is drawn towards 1 by how uncertain it is: with a prior of ln κ ~ N(0, ½²),
a measurement of relative standard error s counts as 1 / (1 + (s/½)²). Steps move by at most a factor of 2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from pgolf_post.fit.build import Builder, constants_of
from pgolf_post.fit.probe import Probe
from pgolf_post.fit.steps import constant_for
from pgolf_post.progress import progress_bar

ROLE_LOSS = 0.006  # nats per token that a role alone should cost: to be seen, and still quadratic
PRIOR = 0.5  # standard deviation of ln κ
LARGEST = 4.0  # κ and 1/κ


@dataclass(frozen=True)
class Kappa:
    """One role's measurement."""

    predicted: float  # nats per token
    measured: float
    error: float  # standard error of the measured
    kappa: float  # what is used

    def facts(self) -> dict[str, Any]:
        return asdict(self)


def measure_kappas(builder: Builder, probe: Probe) -> dict[str, Kappa]:
    """κ of every role that has matrices."""
    roles = dict.fromkeys(part.role for part in builder.parts.values())
    found = {}
    with progress_bar("measuring sensitivities", len(roles)) as advance:
        for role in roles:
            found[role] = _measure(role, builder, probe)
            advance(1)
    return found


def _measure(role: str, builder: Builder, probe: Probe) -> Kappa:
    parts = [part for part in builder.parts.values() if part.role == role]
    constant = constant_for(sum(part.num_weights for part in parts), ROLE_LOSS)
    quantized = builder.quantize(constants_of(parts, constant, {}))
    predicted = sum(float(tensor.facts["predicted_loss"]) for tensor in quantized.values())
    own = builder.view.tensors
    errors = {name: torch.from_numpy(tensor.dequantize()) - own[name] for name, tensor in quantized.items()}
    found = probe.curvature(errors)
    return Kappa(predicted, found.mean, found.error, estimate(predicted, found.mean, found.error))


def estimate(predicted: float, measured: float, error: float) -> float:
    """κ from a prediction and a measurement with its standard error. 1 where nothing was measured."""
    ratio, spread = measured / predicted, error / predicted
    if not (math.isfinite(spread) and math.isfinite(ratio)):
        return 1.0
    ratio = max(ratio, 1 / LARGEST**2)
    trust = 1 / (1 + (spread / max(ratio, 1 / LARGEST) / PRIOR) ** 2)
    return min(LARGEST, max(1 / LARGEST, ratio**trust))


def used(kappas: Mapping[str, Kappa]) -> dict[str, float]:
    """Role → κ."""
    return {role: found.kappa for role, found in kappas.items()}
