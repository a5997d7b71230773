"""torch.compile of the training loss, and the warm-up that keeps compilation off the training clock.

Depth recurrence changes the graph in the middle of a run, and a graph that is compiled when it first appears costs
minutes of a ten-minute run. So before the clock starts, every graph that the schedule will reach takes some whole steps
on synthetic tokens; then weights, moments, gradients, random state and graph are put back bit for bit. The code object
is this run's own, so that what other runs of the process compiled counts neither as cached nor towards torch's limit on
recompilation, and documents are given to it as data, not as shapes: where they lie never makes a new graph.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf_post.base.progress import say
from trainer.attention_backends import Reach
from trainer.model import BOS_ID, GolfGPT
from trainer.schedule import active_loops_at

if TYPE_CHECKING:
    from trainer.loop import Trainer

CompileChoice = Literal["auto"] | bool
LossFunction = Callable[[GolfGPT, Tensor, Tensor, Reach], Tensor]

COMPILER = "inductor"
DEFAULT_WARMUP_STEPS = 2  # of each graph, where the loss is compiled
SYNTHETIC_DOCUMENT = 64  # mean length, in tokens, of synthetic documents


def training_loss(
    model: GolfGPT,
    inputs: Tensor,  # (batch, seq_len) int64
    targets: Tensor,  # (batch, seq_len) int64
    reach: Reach,  # of inputs
) -> Tensor:  # () mean nats per token, float32 (float64 of a float64 model)
    """Mean cross-entropy of the model's predictions."""
    logits = model.logits(model.hidden(inputs, reach))
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def compiles(choice: CompileChoice, device: torch.device) -> bool:
    """Whether to compile: "auto" does on a GPU, where it pays within a run, and not on a CPU, where it rarely does."""
    return device.type == "cuda" if choice == "auto" else choice


def compiled_loss(eager: LossFunction) -> LossFunction:
    """A compiled loss function with a cache of its own; one graph for each state of the model's visits."""
    assert isinstance(eager, FunctionType)
    own = FunctionType(eager.__code__.replace(), eager.__globals__, eager.__name__)
    compiled = torch.compile(own, backend=COMPILER, fullgraph=True, dynamic=False)

    def loss(model: GolfGPT, inputs: Tensor, targets: Tensor, reach: Reach) -> Tensor:
        if isinstance(reach.within, Tensor) and reach.within.ndim == 1:  # as many boundaries as documents
            torch._dynamo.maybe_mark_dynamic(reach.within, 0)
        result: Tensor = compiled(model, inputs, targets, reach)
        return result

    return loss


def num_compiled_graphs() -> int:
    """Graphs that torch has compiled in this process so far."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def num_warmup_steps(trainer: Trainer) -> int:
    """Warm-up steps of each graph: as the recipe says, else what compiling needs."""
    steps = trainer.recipe.run.warmup_steps
    if steps is None:
        return DEFAULT_WARMUP_STEPS if trainer.compiled else 0
    return steps


def graphs_ahead(trainer: Trainer) -> list[int]:
    """The numbers of active loops that a run reaches from where it is on, ascending."""
    schedule, at = trainer.recipe.schedule, trainer.progress
    switches = [share for share in (schedule.loops_at, schedule.all_loops_at) if share is not None and share > at]
    max_loops = trainer.model.config.max_active_loops
    return sorted({active_loops_at(schedule, max_loops, share) for share in (at, *switches, 1.0)})


def synthetic_batch(
    vocab_size: int, batch: int, seq_len: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:  # inputs, targets, each (batch, seq_len) int64
    """Uniform tokens with a BOS here and there: no text, not even as a shape."""
    tokens = torch.randint(vocab_size, (batch, seq_len + 1), generator=generator)
    tokens[torch.rand(tokens.shape, generator=generator) < 1 / SYNTHETIC_DOCUMENT] = BOS_ID
    return tokens[:, :-1], tokens[:, 1:]


@contextmanager
def state_restored(trainer: Trainer) -> Iterator[None]:
    """Put weights, moments, random state and graph back, bit for bit, and drop gradients, when the block is left."""
    model, optimizer = trainer.model, trainer.optimizer
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    moments = {name: tensor.clone() for name, tensor in optimizer.state().items()}
    graph, devices = model.graph, [trainer.device] if trainer.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        yield
    model.load_state_dict(weights)
    optimizer.adam.state.clear()  # moments that had not begun do not begin
    optimizer.load_state(moments, "the state before warm-up")
    model.zero_grad(set_to_none=True)
    model.set_graph(graph)


def warm_up(trainer: Trainer) -> dict[str, Any]:
    """Take `run.warmup_steps` optimizer steps on synthetic tokens with every graph that the run will use.

    Nothing of the run changes. Returns what meta.json says of it: steps of each graph, the graphs by their active
    loops, seconds, and how many graphs torch had compiled by then.
    """
    started, model, device = time.perf_counter(), trainer.model, trainer.device
    steps, loops = num_warmup_steps(trainer), graphs_ahead(trainer)
    seq_len, generator = trainer.recipe.data.seq_len, torch.Generator().manual_seed(trainer.recipe.run.seed)
    num_windows = trainer.micro_tokens // seq_len
    if steps:
        say(f"warming up: {steps} steps of synthetic tokens with {loops} active loops, not on the training clock")
        with state_restored(trainer):
            for active in loops:
                model.set_graph(model.graph.model_copy(update={"active_loops": active}))
                for _ in range(steps):
                    trainer.rehearse(*synthetic_batch(model.config.vocab_size, num_windows, seq_len, generator))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return {
        "steps_per_graph": steps,
        "active_loops": loops if steps else [],
        "seconds": round(time.perf_counter() - started, 3),
        "compiled_graphs": num_compiled_graphs() if trainer.compiled else 0,
    }


def say_late_graphs(trainer: Trainer, warmed: dict[str, Any]) -> None:
    """Say so if torch compiled during training what the warm-up should have covered."""
    late = num_compiled_graphs() - warmed["compiled_graphs"] if trainer.compiled else 0
    if late:
        say(
            f"{late} graphs were compiled on the training clock; raise run.warmup_steps if it is 0, else see TORCH_LOGS"
        )
