"""κ: by how much the quadratic model of the loss is off, measured tensor by tensor.

The model of sensitivity.py leaves out what couples tensors, tokens and rows, and its errors are not alike: on a looped
model of 4.6M parameters the divergence that a tensor's quantization causes is 0.3 to 1.3 times what was predicted,
most in the blocks that are visited repeatedly and least in the embedding. So each tensor (or each role, where a tensor
is too dear) is quantized alone and the divergence it causes on training text (probe.py) is divided by the prediction.
Only κ relative to each other matter to the solver; they are drawn towards their common mean by how uncertain they are,
and steps move by at most a factor of 2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from pgolf_post.base.progress import progress_bar
from pgolf_post.fit.build import Builder
from pgolf_post.fit.probe import Measured, Probe
from pgolf_post.fit.steps import constant_for

MODEL_LOSS = 0.004  # nats per token of the whole model at the steps that are tried: about where budgets lie
PRIOR = 0.5  # standard deviation of ln κ about the common mean
LARGEST = 4.0  # κ and 1/κ, relative to the common mean


@dataclass(frozen=True)
class Kappa:
    """One tensor's measurement, or one role's."""

    predicted: float  # nats per token
    measured: float
    error: float  # standard error of the measured
    kappa: float  # what is used

    def facts(self) -> dict[str, Any]:
        return asdict(self)


def groups_of(builder: Builder, by: str) -> dict[str, list[str]]:
    """What is measured together: name of the tensor or role → tensors."""
    found: dict[str, list[str]] = {}
    for name, part in builder.parts.items():
        found.setdefault(name if by == "tensor" else part.role, []).append(name)
    return found


def measure_kappas(builder: Builder, probe: Probe, by: str) -> dict[str, Kappa]:
    """κ of every group of matrices."""
    constant = constant_for(builder.num_weights, MODEL_LOSS)
    quantized = builder.quantize(dict.fromkeys(builder.parts, constant))
    groups, found = groups_of(builder, by), {}
    with progress_bar("measuring sensitivities", len(groups)) as advance:
        for group, names in groups.items():
            tensors = {name: torch.from_numpy(quantized[name].dequantize()) for name in names}
            predicted = sum(float(quantized[name].facts["predicted_loss"]) for name in names)
            found[group] = predicted, probe.divergence(tensors)
            advance(1)
    common = sum(measured.mean for _, measured in found.values()) / sum(predicted for predicted, _ in found.values())
    return {group: _kappa(predicted, measured, common) for group, (predicted, measured) in found.items()}


def _kappa(predicted: float, measured: Measured, common: float) -> Kappa:
    kappa = estimate(predicted, measured.mean, measured.error, common)
    return Kappa(predicted, measured.mean, measured.error, kappa)


def estimate(predicted: float, measured: float, error: float, common: float = 1.0) -> float:
    """κ from a prediction and a measurement with its standard error; `common` where nothing was measured."""
    ratio, spread = measured / predicted / common, error / predicted / common
    if not (math.isfinite(spread) and math.isfinite(ratio)):
        return common
    ratio = max(ratio, 1 / LARGEST**2)
    trust = 1 / (1 + (spread / max(ratio, 1 / LARGEST) / PRIOR) ** 2)
    return common * min(LARGEST, max(1 / LARGEST, ratio**trust))


def by_tensor(builder: Builder, kappas: Mapping[str, Kappa], by: str) -> dict[str, float]:
    """Tensor → κ; 1 for all where nothing was measured."""
    groups: Mapping[str, Sequence[str]] = groups_of(builder, by)
    if not kappas:
        return dict.fromkeys(builder.parts, 1.0)
    return {name: kappas[group].kappa for group, names in groups.items() for name in names}
