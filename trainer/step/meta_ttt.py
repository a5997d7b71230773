"""Training for test-time training: some steps learn from how the model does after it has adapted to text before.

Every n-th step halves each micro-batch. The weights take a few steps of plain gradient descent on the first half; the
gradient of the second half at the weights that result is the step's own, and the weights are put back. That is
first-order MAML (Finn et al. 2017, arXiv:1703.03400, section 5.2): derivatives through the adapting are left out. With
one inner step it costs what any other step costs, and one copy of the weights.

Each micro-batch adapts by itself, so the result does not depend on how ranks share micro-batches of one size. The loss
that is logged is that of the first half before adapting: plain nats, as of every other step.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from pgolf_post.errors import SettingsError
from trainer.config import Recipe
from trainer.step.gradients import GradientAccumulator, micro_batch_tokens
from trainer.step.meta_ttt_settings import MetaTTTSettings

Batch = tuple[Tensor, Tensor]  # inputs and targets, each (windows, seq_len)


class MetaTTT:
    """The steps of a run that adapt first."""

    def __init__(self, settings: MetaTTTSettings, gradients: GradientAccumulator) -> None:
        self.settings, self.gradients = settings, gradients
        heads = gradients.objective.heads if gradients.objective else None
        trained = [*gradients.model.parameters(), *(heads.parameters() if heads else ())]
        self.parameters = [parameter for parameter in trained if parameter.requires_grad]

    def is_due(self, step: int) -> bool:
        """Return whether step `step` (counted from 0) adapts first: the last of every n."""
        return (step + 1) % self.settings.every == 0

    def accumulate(self, batches: Iterable[Batch]) -> Tensor:  # () float64
        """Do what `GradientAccumulator.accumulate` does, with gradients after adapting; the nats are those before."""
        gradients = self.gradients
        total = torch.zeros(2, dtype=torch.float64, device=gradients.device)
        for inputs, targets in batches:
            half = len(inputs) // 2
            total += gradients.share * self._query((inputs[:half], targets[:half]), (inputs[half:], targets[half:]))
        if gradients.objective is not None:
            gradients.objective_share = total[0]
        return total[1]

    def _query(self, support: Batch, query: Batch) -> Tensor:  # (2,): objective and nats of the support, before
        """Adapt to one half, add the gradients of the other, and put the weights back."""
        kept = [parameter.detach().clone() for parameter in self.parameters]
        outer = self._take_gradients()
        first: Tensor | None = None
        for _ in range(self.settings.inner_steps):
            told = self._backward(support, 1.0)
            first = told if first is None else first
            with torch.no_grad():
                for parameter, gradient in zip(self.parameters, self._take_gradients(), strict=True):
                    if gradient is not None:
                        parameter.sub_(self.settings.inner_lr * gradient)
        self._backward(query, self.gradients.share)
        with torch.no_grad():
            for parameter, value, gradient in zip(self.parameters, kept, outer, strict=True):
                parameter.copy_(value)
                if gradient is not None:
                    parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        assert first is not None
        return first

    def _backward(self, batch: Batch, scale: float) -> Tensor:  # (2,) float64: objective and nats, not scaled
        """Run backward at the weights of now."""
        gradients = self.gradients
        if gradients.twin:
            gradients.twin.take_weights()
        loss = gradients.loss(*batch)
        both = loss if loss.ndim else torch.stack([loss, loss.detach()])
        (both[0] * scale).backward()
        if gradients.twin:
            gradients.twin.give_gradients()
        return both.detach().double()

    def _take_gradients(self) -> list[Tensor | None]:
        """Return the gradients that have gathered, and clear them."""
        found = [parameter.grad for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        return found


def require_halves(recipe: Recipe, world_size: int) -> None:
    """Raise SettingsError for a micro-batch that does not halve into whole windows."""
    for stage in recipe.stages if recipe.meta_ttt else ():
        windows = micro_batch_tokens(recipe, world_size, stage) // stage.seq_len
        if windows % 2:
            raise SettingsError(
                f"meta_ttt: micro-batches of {windows} windows of {stage.seq_len} tokens do not halve; a rank adapts "
                "to one half and learns from the other",
                hint="set data.micro_batch_tokens to an even number of windows",
            )
