"""Muon's updates as one compiled graph for each shape of bank: what is left of them on a GPU is mostly products.

Eager Newton-Schulz launches five kernels an iteration and its momentum, norms and casts another ten a bank. Here each
iteration is three products and one small kernel: a·x + (b·G + c·G²)·x is (a·I + b·G + c·G²)·x, so the polynomial of the
Gram matrix G takes in the identity, in float32, and nothing of x's size is added. `trainer.run.warm_up` takes whole
steps, so these graphs too are compiled before the clock starts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.config import CompileChoice
from trainer.optim.muon import Coefficients, Scheme, UpdateFunction, muon_updates
from trainer.step.compiled import own_graphs


def iterations(x: Tensor, coefficients: Coefficients) -> Tensor:
    """Run the iterations as three batched products each; eager, the small matrices between them cost more kernels."""
    identity = torch.eye(x.size(-2), dtype=torch.float32, device=x.device)
    for a, b, c in coefficients:
        gram = torch.bmm(x, x.mT)
        polynomial = a * identity + b * gram.float() + c * torch.bmm(gram, gram).float()
        x = torch.bmm(polynomial.to(x.dtype), x)
    return x


class CompiledUpdates:
    """A compiled `muon_updates`, with a cache of its own, for gradients and momenta on a GPU."""

    def __init__(self) -> None:
        self.graphs = own_graphs(muon_updates)
        self.momentum, self.pace = float("nan"), torch.empty(0)  # the last momentum, and the same as a tensor ()

    def __call__(
        self,
        gradients: Tensor,  # (n, rows, cols)
        momenta: Tensor,  # (n, rows, cols), changed in place
        momentum: float | Tensor,
        scheme: Scheme,
        row_normalize: bool,
    ) -> Tensor:  # (n, rows, cols)
        # The momentum changes from step to step: as a number it would be part of the graph.
        if isinstance(momentum, float) and momentum != self.momentum:
            self.momentum, self.pace = momentum, torch.full((), momentum, device=momenta.device)
        pace = momentum if isinstance(momentum, Tensor) else self.pace
        result: Tensor = self.graphs(gradients, momenta, pace, scheme._replace(narrow=iterations), row_normalize)
        return result


def updates_for(choice: CompileChoice, device: torch.device) -> UpdateFunction:
    """Return how a run computes its updates: compiled on a GPU, unless nothing is to be compiled there."""
    return CompiledUpdates() if device.type == "cuda" and choice is not False else muon_updates
