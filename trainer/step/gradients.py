"""Forward and backward of a step on this rank: micro-batches in, accumulated gradients and the mean loss out.

How the loss is computed (autocast, a bfloat16 twin, fused kernels, torch.compile) is decided here once, from the recipe
and the device; the loop, the warm-up and the measurement of the reserve all go through it, so what is warmed up and
measured is what runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pgolf_post.base.copying import to_device
from pgolf_post.errors import SettingsError
from trainer.config import Recipe, TrainingPrecision
from trainer.kernels import LOSS_KERNELS, fused_loss
from trainer.model.gpt import GolfGPT
from trainer.step.compiled import LossFunction, compiled_loss, compiles, require_compiled, training_loss
from trainer.step.distributed import TrainingRanks
from trainer.step.twin import Twin, narrow_stream

if TYPE_CHECKING:
    from trainer.schedule.stages import Stage
    from trainer.step.objective import Objective


def training_autocast(precision: TrainingPrecision, device: torch.device) -> torch.dtype | None:
    """Return the autocast dtype: bf16 where asked for or, for "auto", where the processor multiplies it natively."""
    if precision in ("fp32", "fp64"):
        return None
    if precision == "bf16" or device.type == "cuda":
        return torch.bfloat16
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else None


def micro_batch_tokens(recipe: Recipe, world_size: int, stage: Stage | None = None) -> int:
    """Return the tokens of one backward pass on one rank, in a stage of the run; default the first.

    Raises SettingsError if ranks cannot share a step's batch equally.
    """
    data = recipe.data
    batch, seq_len = (stage.batch_tokens, stage.seq_len) if stage else (data.batch_tokens, data.seq_len)
    tokens = data.micro_batch_tokens or batch // world_size
    if tokens % seq_len or batch % (tokens * world_size):
        where = f"schedule.stages at {stage.at:g}: batch_tokens" if stage and stage.at else "data.batch_tokens"
        raise SettingsError(
            f"{where} {batch} cannot be shared by {world_size} ranks in micro-batches of "
            f"{tokens} tokens of whole sequences of {seq_len}",
            hint="change data.micro_batch_tokens or the number of processes",
        )
    return tokens


class GradientAccumulator:
    """The loss of a micro-batch, and its gradients accumulated over the micro-batches of a step."""

    def __init__(
        self,
        recipe: Recipe,
        model: GolfGPT,
        ranks: TrainingRanks,
        autocast: torch.dtype | None,
        micro_tokens: int,
        objective: Objective | None = None,  # None = plain nats
    ) -> None:
        self.model, self.device, self.autocast = model, ranks.device, autocast
        self.micro_tokens = micro_tokens  # of one backward pass on this rank
        self.share = micro_tokens / recipe.data.batch_tokens  # of a step's loss
        self.compiled = compiles(recipe.run.compile, self.device)
        require_compiled(recipe.run.compile_mode, self.compiled)
        self.objective = objective
        self.objective_share: Tensor | None = None  # () float64, of the last step: what was minimised, if not nats
        eager_loss: LossFunction = fused_loss if recipe.run.kernels in LOSS_KERNELS else training_loss
        if objective is not None:
            eager_loss = objective.function
        self.loss_function = compiled_loss(eager_loss, recipe.run.compile_mode) if self.compiled else eager_loss
        narrow = narrow_stream(recipe.run.stream, self.device, autocast)
        self.twin = Twin(model, recipe.data.seq_len) if narrow else None

    def take_sizes(self, micro_tokens: int, batch_tokens: int) -> None:
        """Go on with other tokens of a backward pass on this rank, and of a step."""
        self.micro_tokens, self.share = micro_tokens, micro_tokens / batch_tokens

    def loss(
        self,
        inputs: Tensor,  # (batch, seq_len) int64, on the CPU
        targets: Tensor,  # (batch, seq_len) int64, on the CPU
    ) -> Tensor:  # () mean nats per token; with an objective (2,): it, then nats
        """Return the loss of one micro-batch, differentiable in the parameters of what computes it: model or twin."""
        computing = self.twin.module if self.twin else self.model
        enabled = torch.autocast(self.device.type, self.autocast) if self.autocast else contextlib.nullcontext()
        with enabled:
            reach = self.model.reach(inputs)
            inputs, targets = to_device(inputs, self.device), to_device(targets, self.device)
            return self.loss_function(computing, inputs, targets, reach)

    def accumulate(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Tensor:  # () float64
        """Run backward over this rank's micro-batches of a step. Return their share of the step's mean nats."""
        if self.objective is not None:
            return self._accumulate_objective(batches)
        total: Tensor | None = None
        if self.twin:
            self.twin.take_weights()
        for inputs, targets in batches:
            loss = self.loss(inputs, targets)
            loss.backward(torch.full_like(loss, self.share))
            if self.twin:
                self.twin.give_gradients()
            nats = loss.detach() * self.share  # read once, after the optimizer's step: reading waits for the device
            total = nats.double() if total is None else total + nats
        return torch.zeros((), dtype=torch.float64, device=self.device) if total is None else total

    def _accumulate_objective(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Tensor:  # () float64
        """Do what `accumulate` does by an objective; its own share is `objective_share`."""
        totals = torch.zeros(2, dtype=torch.float64, device=self.device)
        if self.twin:
            self.twin.take_weights()
        for inputs, targets in batches:
            both = self.loss(inputs, targets) * self.share
            both[0].backward()
            if self.twin:
                self.twin.give_gradients()
            totals += both.detach()
        self.objective_share, nats = totals.unbind()
        return nats
