"""Momentum preconditioned by the sensitivities: the optimizer that fine-tuning learns most from little text with.

The quadratic model of the loss, ½ · tr(C·E·M·Eᵀ) for an error E of a matrix, is known before tuning starts, so nothing
about a matrix's curvature has to be learnt from the text. A step goes along C^(-1/2)·G·M^(-1/2) for a gradient G. Half
the power of a natural gradient is what evens out the *noise* of G, whose covariance is like C and M. (Shampoo, arXiv
1802.09568, learns both sides from gradients; Adam does so for each weight alone.) A natural gradient itself follows
directions in which little text says nothing and diverges. What is left of scale is one number for each matrix: steps
are divided by their root mean square so far, so that a rate is what a weight moves by in a step, as Adam's is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pgolf_post.fit.sensitivity import Sensitivity

STEP_TOKENS = 512  # per batch, at least one window: many small steps, which momentum averages
RATE_RATIO = 3.0  # to the rates that suit Adam
BETAS = (0.9, 0.99)  # of the step's mean, and of its mean square
LEAST_EIGENVALUE = 1e-9  # relative to the mean: the ridge has raised them above it


@dataclass(frozen=True)
class Roots:
    """The inverse square roots of both sides of a matrix's quadratic model, float32, each of mean square about 1."""

    outputs: Tensor  # (out, out) C^(-1/2)
    inputs: Tensor  # (in, in) M^(-1/2)

    def applied(self, gradient: Tensor) -> Tensor:  # any shape of out · in numbers → the same
        """Return C^(-1/2)·G·M^(-1/2)."""
        return (self.outputs @ gradient.reshape(len(self.outputs), -1) @ self.inputs).view_as(gradient)

    def to(self, device: torch.device) -> Roots:
        return Roots(self.outputs.to(device), self.inputs.to(device))


def roots_of(sensitivity: Sensitivity) -> Roots:
    """Return the inverse roots of a sensitivity. Costs an eigendecomposition of each side."""
    rows = sensitivity.rows
    outputs = torch.diag(rows.rsqrt()).float() if sensitivity.coupling is None else _inverse_root(sensitivity.coupling)
    return Roots(outputs, _inverse_root(sensitivity.moments))


def empty_roots(parameter: Tensor) -> Roots:  # (out, …)
    """Return zeros of the shapes that a parameter's roots have, on its device, for another rank's to be added to."""
    columns = parameter.numel() // len(parameter)
    return Roots(parameter.new_zeros(len(parameter), len(parameter)), parameter.new_zeros(columns, columns))


def _inverse_root(matrix: Tensor) -> Tensor:  # (n, n) float64, positive definite → (n, n) float32
    """Return a multiple of the matrix to the power -1/2: its scale does not matter, since steps are normalised."""
    values, vectors = torch.linalg.eigh(matrix / matrix.diagonal().mean())
    return ((vectors * values.clamp_min(LEAST_EIGENVALUE).rsqrt()) @ vectors.T).float()


class PreconditionedMomentum(torch.optim.Optimizer):
    """Steps along the mean of C^(-1/2)·G·M^(-1/2), of a root mean square of at most about the rate.

    Each group is one matrix with its `roots` and its rate `lr`.
    """

    def __init__(self, groups: Iterable[Mapping[str, Any]]) -> None:
        super().__init__([dict(group) for group in groups], {"lr": 0.0, "roots": None})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every matrix that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group["roots"].applied(parameter.grad), group["lr"])

    def _move(self, parameter: Tensor, direction: Tensor, rate: float) -> None:
        state = self.state[parameter]
        if not state:
            state["mean"], state["square"] = torch.zeros_like(parameter), parameter.new_zeros(())
            state["count"] = 0
        state["count"] += 1
        decay, slow_decay = BETAS
        state["mean"].lerp_(direction, 1 - decay)
        state["square"].lerp_(direction.square().mean(), 1 - slow_decay)

        # Both means start from zero, so each is divided by the share of it that is there.
        square = state["square"] / (1 - slow_decay ** state["count"])
        scale = rate / (1 - decay ** state["count"]) / square.sqrt().clamp_min(torch.finfo(square.dtype).tiny)
        parameter.sub_(state["mean"] * scale)
