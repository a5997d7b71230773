"""An alarm on the gradient norm: a step above `run.grad_norm_limit` is warned of, or ends the run with a checkpoint.

Clipping hides a blow-up: the step is as long as any other, in a direction that may mean nothing. The norm is the one
before clipping, as train.jsonl has it. Ranks decide together, in the transfer that sums their losses anyway.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pgolf_post.base.progress import say
from pgolf_post.errors import NumericsError
from trainer.config import RunSettings


def hint_of_divergence(autocast: torch.dtype | None) -> str:
    """Return what to change of a run that diverged; its precision only where it computes in less than float32."""
    precision = ", or raise precision with --set run.precision=fp32"
    return f"lower optim.matrix_lr or optim.embed_lr{precision if autocast else ''}"


class NormAlarm:
    """The limit of a run, and whether the step before was above it."""

    def __init__(self, settings: RunSettings, autocast: torch.dtype | None = None) -> None:
        self.autocast = autocast
        self.limit, self.stops = settings.grad_norm_limit, settings.grad_norm_stop
        self.was_above = False

    def above(self, norm: Tensor) -> tuple[Tensor, ...]:
        """Return 1 if this rank's norm, () float64, is above the limit or is none, else 0; nothing without a limit."""
        return () if self.limit is None else (torch.logical_not(norm <= self.limit).double(),)

    def hear(self, num_above: float, norm: float, step: int) -> dict[str, Any] | None:
        """Warn of the first of several steps above the limit. Return facts for meta.json if the run is to end.

        Raises NumericsError for a norm that is not finite: the step has spoilt the weights.
        """
        is_above, was_above = num_above > 0, self.was_above
        self.was_above = is_above
        if not is_above:
            return None
        if not math.isfinite(norm):
            raise NumericsError(
                f"gradient norm is {norm} at step {step:,}; earlier checkpoints of the run are intact",
                hint=hint_of_divergence(self.autocast),
            )
        shown = f"{norm:.4g}" if norm > float(self.limit or 0) else "of another rank"
        reason = f"gradient norm {shown} at step {step:,} is above run.grad_norm_limit {self.limit:g}"
        if not was_above and not self.stops:
            say(f"warning: {reason}; train.jsonl has the norm of every step")
        return {"reason": reason, "grad_norm": norm, "step": step} if self.stops else None
