"""Depth recurrence: how a re-visit of a block differs from the first visit.

A block that is visited again can carry: its output F(x) becomes β_i·F(x) + Σ_j α_ij·first_j, with first_j what looped
block j gave on its first visit, cut off from the gradient. β = 1 and α = 0 leave the plain loop. The coefficients are
learned, or frozen at values that an earlier run had learned; they may differ from one re-visit to the next.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer.model.architecture import ArchitectureSettings
from trainer.model.visits import looped_layers, revisits


def carry_coefficients(config: ArchitectureSettings) -> tuple[nn.Parameter, nn.Parameter]:
    """Return β (loop_size,) and α (loop_size, loop_size) at the start, with a leading (passes,) if per pass.

    Frozen coefficients are parameters too, without a gradient, so that averages and checkpoints hold them.
    """
    size, passes = len(looped_layers(config)), max(revisits(config).values())
    beta, alpha = torch.ones(size), torch.zeros(size, size)
    if config.carry_beta is not None:
        beta = torch.tensor(config.carry_beta)
    if config.carry_alpha is not None:
        alpha = torch.tensor(config.carry_alpha)
    if config.carry_per_pass:
        beta = beta if beta.ndim == 2 else beta.repeat(passes, 1)
        alpha = alpha if alpha.ndim == 3 else alpha.repeat(passes, 1, 1)
    learnable = config.carry == "learnable"
    return nn.Parameter(beta, requires_grad=learnable), nn.Parameter(alpha, requires_grad=learnable)


class Recurrence:
    """The visits of one forward pass so far: how many each block had, and the first output of each looped block."""

    def __init__(
        self,
        looped: list[int],  # layers that carry; none = no carry
        beta: Tensor | None = None,  # (loop_size,) or (passes, loop_size)
        alpha: Tensor | None = None,  # (loop_size, loop_size) or (passes, loop_size, loop_size)
    ) -> None:
        self.looped, self.beta, self.alpha = looped, beta, alpha
        self.visits: dict[int, int] = {}
        self.place = 0  # of the next visit in the list
        self.first: dict[int, Tensor] = {}  # layer → (batch, seq_len, model_dim)

    def enter(self, layer: int) -> int:
        """Count a visit. Return 0 on a block's first visit, k on its k-th re-visit."""
        revisit = self.visits.get(layer, 0)
        self.visits[layer] = revisit + 1
        self.place += 1
        return revisit

    def carry(
        self,
        layer: int,
        revisit: int,
        output: Tensor,  # (batch, seq_len, model_dim)
    ) -> Tensor:  # (batch, seq_len, model_dim)
        """Return the block's output with the carry added; blocks not yet visited have nothing to add."""
        if self.beta is None or self.alpha is None or layer not in self.looped:
            return output
        if revisit == 0:
            self.first[layer] = output.detach()
            return output
        per_pass, row = self.beta.ndim == 2, self.looped.index(layer)
        beta = self.beta[revisit - 1, row] if per_pass else self.beta[row]
        alpha = self.alpha[revisit - 1, row] if per_pass else self.alpha[row]
        carried = beta * output
        for column, source in enumerate(self.looped):
            if source in self.first:
                carried = carried + alpha[column] * self.first[source]
        return carried
