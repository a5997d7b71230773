"""torch.compile of the training loss: one graph for each state of the model's visits.

The code object is this run's own, so that what other runs of the process compiled counts neither as cached nor towards
torch's limit on recompilation. Documents are given to it as data, not as shapes: where they lie never makes a new
graph. `trainer.run.warm_up` keeps compilation off the training clock.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf_post.errors import SettingsError
from trainer.config import CompileChoice, CompileMode
from trainer.model.attention_backends import Reach
from trainer.model.gpt import GolfGPT

LossFunction = Callable[[GolfGPT, Tensor, Tensor, Reach], Tensor]  # of model, inputs, targets, their reach

COMPILER = "inductor"


def training_loss(
    model: GolfGPT,
    inputs: Tensor,  # (batch, seq_len) int64
    targets: Tensor,  # (batch, seq_len) int64
    reach: Reach,  # of inputs
) -> Tensor:  # () mean nats per token, float32 (float64 of a float64 model)
    """Return the mean cross-entropy of the model's predictions."""
    logits = model.logits(model.hidden(inputs, reach))
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def compiles(choice: CompileChoice, device: torch.device) -> bool:
    """Return whether to compile: "auto" does on a GPU, where it pays within a run; on a CPU it rarely does."""
    return device.type == "cuda" if choice == "auto" else choice


def require_compiled(mode: CompileMode, compiled: bool) -> None:
    """Raise SettingsError for a mode of compiling where nothing is compiled."""
    if mode != "default" and not compiled:
        raise SettingsError(
            f'run.compile_mode = "{mode}" acts only where the loss is compiled, which "auto" does on a GPU alone',
            hint="set run.compile = true, or leave run.compile_mode out",
        )


def own_graphs(eager: Callable[..., Any], mode: CompileMode = "default") -> Callable[..., Any]:
    """Return a compiled function with a cache of its own; its sizes are fixed, and a graph break is an error."""
    assert isinstance(eager, FunctionType)
    own = FunctionType(eager.__code__.replace(), eager.__globals__, eager.__name__, None, eager.__closure__)
    chosen = None if mode == "default" else mode
    compiled: Callable[..., Any] = torch.compile(own, backend=COMPILER, mode=chosen, fullgraph=True, dynamic=False)
    return compiled


def compiled_loss(eager: LossFunction, mode: CompileMode = "default") -> LossFunction:
    """Return a compiled loss function."""
    compiled = own_graphs(eager, mode)

    def loss(model: GolfGPT, inputs: Tensor, targets: Tensor, reach: Reach) -> Tensor:
        for within in reach.within if isinstance(reach.within, tuple) else (reach.within,):
            if isinstance(within, Tensor) and within.ndim == 1:  # as many boundaries as documents
                torch._dynamo.maybe_mark_dynamic(within, 0)
        result: Tensor = compiled(model, inputs, targets, reach)
        return result

    return loss


def num_compiled_graphs() -> int:
    """Return the number of graphs that torch has compiled in this process so far."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])
