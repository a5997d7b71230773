"""κ: by how much the quadratic model of the loss is off, measured tensor by tensor.

The model of sensitivity.py leaves out what couples tensors, tokens and rows, and its errors are not alike: on a looped
model of 4.6M parameters the divergence that a tensor's quantization causes is 0.3 to 1.3 times what was predicted,
most in the blocks that are visited repeatedly and least in the embedding. So each tensor is quantized alone, and the
divergence that this causes on training text (probe.py) is divided by the prediction. Only κ relative to each other
matter to the solver. They are drawn towards their common mean by how uncertain they are, and steps move by at most a
factor of 2.

By role, all tensors of a role share one κ: the median of their ln κ, weighted by predicted loss. A ratio of sums would
follow whichever tensor is furthest off; a median ignores it unless it makes up half of the role's loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from pgolf_post.base.progress import progress_bar
from pgolf_post.fit.build import Builder
from pgolf_post.fit.probe import Probe
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
    """Return the groups of tensors that share a κ: name of the tensor or role → tensors."""
    groups: dict[str, list[str]] = {}
    for name, matrix in builder.matrices.items():
        groups.setdefault(name if by == "tensor" else matrix.role, []).append(name)
    return groups


def measure_kappas(builder: Builder, probe: Probe, by: str) -> dict[str, Kappa]:
    """Measure κ of every tensor, and return it by tensor or by role; of no tensor where nothing is rounded."""
    if not builder.matrices:
        return {}
    constant = constant_for(builder.num_weights, MODEL_LOSS)
    quantized = builder.quantize(dict.fromkeys(builder.matrices, constant))
    predicted = {name: float(tensor.facts["predicted_loss"]) for name, tensor in quantized.items()}
    with progress_bar("measuring sensitivities", len(quantized) * len(probe.batches), "passes") as advance:
        alone = [{name: torch.from_numpy(tensor.dequantize())} for name, tensor in quantized.items()]
        measured = dict(zip(quantized, probe.divergences(alone, advance), strict=True))
    common = common_ratio(sum(one.mean for one in measured.values()), sum(predicted.values()))
    kappas = {
        name: Kappa(predicted[name], one.mean, one.error, estimate(predicted[name], one.mean, one.error, common))
        for name, one in measured.items()
    }
    if by == "tensor":
        return kappas
    return {role: of_role([kappas[name] for name in names]) for role, names in groups_of(builder, by).items()}


def common_ratio(measured: float, predicted: float) -> float:
    """Return the κ of all tensors together; 1 where nothing was predicted or nothing could be measured."""
    ratio = measured / predicted if predicted > 0 else math.nan
    return ratio if math.isfinite(ratio) and ratio > 0 else 1.0


def of_role(kappas: Sequence[Kappa]) -> Kappa:
    """Return the κ that several tensors share, beside the sums of what was predicted and measured of them."""
    predicted, measured = sum(one.predicted for one in kappas), sum(one.measured for one in kappas)
    error = math.sqrt(sum(one.error**2 for one in kappas))
    logs, weights = [math.log(one.kappa) for one in kappas], [one.predicted for one in kappas]
    return Kappa(predicted, measured, error, math.exp(weighted_median(logs, weights)))


def weighted_median(values: Sequence[float], weights: Sequence[float]) -> float:
    """Return the value below which half of the weight lies; the mean of two where the halves meet between them."""
    order = np.argsort(values)
    alike = weights if sum(weights) > 0 else [1.0] * len(weights)  # no weight at all: the plain median
    ordered, shares = np.asarray(values)[order], np.cumsum(np.asarray(alike)[order]) / sum(alike)
    low, high = (int(np.searchsorted(shares, 0.5 + nudge)) for nudge in (-1e-9, 1e-9))
    return float(ordered[low] + ordered[min(high, len(ordered) - 1)]) / 2


def estimate(predicted: float, measured: float, error: float, common: float = 1.0) -> float:
    """Return κ from a prediction and a measurement with its standard error; `common` where nothing was measured."""
    if not predicted > 0:
        return common
    ratio, spread = measured / predicted / common, error / predicted / common
    if not (math.isfinite(spread) and math.isfinite(ratio)):
        return common
    ratio = max(ratio, 1 / LARGEST**2)
    trust = 1 / (1 + (spread / max(ratio, 1 / LARGEST) / PRIOR) ** 2)
    return common * min(LARGEST, max(1 / LARGEST, ratio**trust))


def by_tensor(builder: Builder, kappas: Mapping[str, Kappa], by: str) -> dict[str, float]:
    """Return tensor → κ; 1 for all where nothing was measured."""
    groups: Mapping[str, Sequence[str]] = groups_of(builder, by)
    if not kappas:
        return dict.fromkeys(builder.matrices, 1.0)
    return {name: kappas[group].kappa for group, names in groups.items() for name in names}
