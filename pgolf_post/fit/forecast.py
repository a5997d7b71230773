"""Bytes of an artifact before there are weights: from shapes and a plan alone, so that a run is not trained to be over.

Rows of Gaussian weights are given the plan's own steps; the entropy of a rounded Gaussian is what an entropy coder
comes near. Trained weights are not Gaussian: what they took in place of it was measured by role (TRAINED; see
docs/results/codecs.md). A fit fills its budget whatever the shapes; of it, the bits that a weight gets are told.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pgolf_post.families import ModelFamily
from pgolf_post.fit.estimate import gaussian_bits
from pgolf_post.fit.solve import WINDOW_BYTES
from pgolf_post.plan import Plan, TensorPlan, make_plan
from pgolf_post.quantize.clip import grid_steps
from pgolf_post.quantize.rounding import spread_steps
from pgolf_post.rules import GridRule

SAMPLE_ROWS = 64  # of a matrix
SCALE_BYTES = 1.22  # of a row's fp16 step, compressed
FLOAT_BYTES = 1.5  # of a weight that stays fp16, compressed
TENSOR_BYTES = 17.0  # of a tensor in the manifest, compressed
FIXED_BYTES = 900.0  # of frames, frequency tables and lanes
TRAINED = {"embedding": 0.88, "head": 0.88}  # bits of trained weights ÷ those of Gaussian ones; else 1
SEED = 0


@dataclass(frozen=True)
class RoleBytes:
    """One role's weights and their bytes."""

    weights: int
    bytes: float


@dataclass(frozen=True)
class Forecast:
    """An artifact's bytes by role."""

    plan: str
    roles: dict[str, RoleBytes]
    fixed_bytes: float

    @property
    def artifact_bytes(self) -> int:
        return round(self.fixed_bytes + sum(role.bytes for role in self.roles.values()))

    def facts(self) -> dict[str, Any]:
        """Return the forecast as JSON."""
        roles = {name: {"weights": role.weights, "bytes": round(role.bytes)} for name, role in self.roles.items()}
        return {"plan": self.plan, "artifact_bytes": self.artifact_bytes, "roles": roles}


def forecast(shapes: Mapping[str, torch.Tensor], family: ModelFamily, module: nn.Module, plan: Plan) -> Forecast:
    """Return the bytes that a plan's artifact will take. Raises SettingsError for one that does not fit the model."""
    entries = make_plan(shapes, family, module, plan)
    roles: dict[str, RoleBytes] = {}
    for entry in entries:
        there = roles.get(entry.role, RoleBytes(0, 0.0))
        count = shapes[entry.name].numel()
        roles[entry.role] = RoleBytes(there.weights + count, there.bytes + _entry_bytes(entry, shapes[entry.name]))
    fixed = FIXED_BYTES + TENSOR_BYTES * len(entries) + _correction_bytes(plan, shapes, entries)
    return Forecast(plan.name, roles, fixed)


def _entry_bytes(entry: TensorPlan, tensor: torch.Tensor) -> float:
    rule = entry.rule
    if not isinstance(rule, GridRule):
        return FLOAT_BYTES * tensor.numel()
    rows, columns = (1, tensor.numel()) if tensor.ndim < 2 else (len(tensor), tensor.numel() // len(tensor))
    generator = torch.Generator().manual_seed(SEED)
    sample = torch.randn(min(rows, SAMPLE_ROWS), columns, generator=generator)
    unit_steps = grid_steps(entry.name, sample, rule.without_hessian(), entry.clip, None)
    steps = spread_steps(unit_steps, sample)
    bits = gaussian_bits(torch.log2(sample.std(dim=1, keepdim=True) / steps).double().numpy()).mean()
    kept = 1 - (rule.prune_share if rule.prune != "none" else 0.0)
    units = len(unit_steps) * rows / len(sample) if rule.per != "tensor" else 1
    return float(bits) / 8 * TRAINED.get(entry.role, 1.0) * kept * rows * columns + SCALE_BYTES * units


def _correction_bytes(plan: Plan, shapes: Mapping[str, torch.Tensor], entries: Sequence[TensorPlan]) -> float:
    """Return the bytes of low-rank corrections, as if of the largest matrices: where errors will be is unknown."""
    if plan.lqer is None:
        return 0.0
    matrices = [
        shapes[entry.name] for entry in entries if isinstance(entry.rule, GridRule) and shapes[entry.name].ndim > 1
    ]
    largest = sorted(matrices, key=lambda tensor: tensor.numel(), reverse=True)[: plan.lqer.top_k]
    lqer = plan.lqer
    bits = (0.8, 3.5) if lqer.asymmetric else (lqer.bits - 0.5, lqer.bits - 0.5)  # of A and B, coded
    return sum(lqer.rank * (bits[0] * len(one) + bits[1] * one.numel() / len(one)) / 8 for one in largest)


def fitted_bytes(limit: int) -> int:
    """Return the bytes of an artifact that is fitted to a limit."""
    return limit - WINDOW_BYTES // 2


def bits_left(limit: int, shapes: Mapping[str, torch.Tensor]) -> float:
    """Return the bits that a weight gets where an artifact may take so many bytes."""
    matrices = sum(tensor.numel() for tensor in shapes.values() if tensor.ndim > 1)
    floats = sum(tensor.numel() for tensor in shapes.values() if tensor.ndim < 2)
    return 8 * (limit - FIXED_BYTES - TENSOR_BYTES * len(shapes) - FLOAT_BYTES * floats) / matrices
