"""AWQ: columns that see large inputs are stretched before rounding, so that they lose less (arXiv 2306.00978).

With s_j = (mean |x_j|)^α, normalised to geometric mean 1, W·diag(s) is quantized instead of W and the input is divided
by s: the same function, another grid. α = 0 is no change. Where the input comes straight from another matrix through an
activation that is homogeneous in it (proj(relu(fc x)²): scaling a row of fc by a > 0 scales the input by a²), the
division is folded into that matrix and costs nothing; elsewhere 1/s is stored, one fp16 a column.

A 2×2 worked example: α = 1/2 and mean |x| = (4, 1) give (2, 1), divided by their geometric mean √2: s = (√2, 1/√2).
The first column of W is stretched by √2 and so, seen from W, rounded on a grid √2 times finer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from pgolf_post.calibrate import Stats
from pgolf_post.families import Fold
from pgolf_post.plan import TensorPlan
from pgolf_post.rules import GridRule

FLOOR = 1e-4  # of the largest mean |x|: a column that hardly ever acts is not squeezed beyond what fp16 can undo


def column_scales(mean_abs: Tensor, alpha: float) -> Tensor:  # (in,) → (in,) float32, 1/s exact in float16
    """Return s_j = (mean |x_j|)^α over its geometric mean; all ones where no input was ever seen."""
    values = mean_abs.double()
    largest = float(values.max()) if len(values) else 0.0
    if alpha == 0 or largest <= 0:
        return torch.ones_like(mean_abs, dtype=torch.float32)
    logs = alpha * values.clamp(min=FLOOR * largest).log()
    stored = (logs.mean() - logs).exp().to(torch.float16).float()  # 1/s, as the artifact keeps it
    return 1 / stored


@dataclass
class Stretched:
    """Weights after AWQ, and what is left to undo."""

    tensors: dict[str, Tensor]  # name → tensor; those that AWQ leaves alone are the originals
    scales: dict[str, Tensor] = field(default_factory=dict)  # name → s (in,), of every stretched matrix
    stored: set[str] = field(default_factory=set)  # stretched matrices whose 1/s must travel with them
    folded: dict[str, str] = field(default_factory=dict)  # stretched matrix → the matrix that undoes it

    def decoded(self) -> dict[str, Tensor]:
        """Return every tensor as the decoder should give it: where 1/s is stored, it has been applied."""
        undone = {name: self.tensors[name] / self.scales[name] for name in self.stored}
        return {**self.tensors, **undone}


def stretch(
    tensors: Mapping[str, Tensor], entries: Sequence[TensorPlan], stats: Stats, folds: Mapping[str, Fold]
) -> Stretched:
    """Stretch the columns of every matrix whose rule says so; inputs are untouched. A matrix without a site stays."""
    result = Stretched(dict(tensors))
    for entry in entries:
        if not (isinstance(entry.rule, GridRule) and entry.rule.awq_alpha and entry.site):
            continue
        scales = column_scales(stats.mean_abs(entry.site), entry.rule.awq_alpha)
        result.scales[entry.name] = scales
        result.tensors[entry.name] = result.tensors[entry.name].float() * scales
        # Undone in the matrix before where that is exact, else stored beside this one.
        fold = folds.get(entry.name)
        if fold is None or not entry.rule.awq_fold:
            result.stored.add(entry.name)
            continue
        producer = result.tensors[fold.producer].float()
        result.tensors[fold.producer] = producer * scales.pow(-1 / fold.power)[:, None]
        result.folded[entry.name] = fold.producer
    return result


def stretched_hessian(hessian: Tensor, scales: Tensor) -> Tensor:  # (in, in), (in,) → (in, in)
    """Return the Hessian of inputs divided by s."""
    inverse = 1 / scales.to(hessian)
    return hessian * inverse[:, None] * inverse[None, :]


def stored_factor(scales: Tensor) -> np.ndarray:  # (in,) float16
    """Return 1/s as the artifact keeps it."""
    kept: np.ndarray = (1 / scales).to(torch.float16).numpy()
    return kept
