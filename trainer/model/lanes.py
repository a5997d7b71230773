"""Two residual lanes in the last visits: attention reads the first, the MLP the second.

The public scripts of openai/parameter-golf have three kinds. *Routed* (#1529 and the banked line after it): both read
what the visit before left, and both write to both lanes. *Sequential* (#1204, #1285): the MLP reads the second lane
after attention has written to it, and mixes it with x0 too. *Separate* (#1334): each writes to its own lane only.

Where a list visits a layer below the lanes' start after they split (PARALLEL_START_LAYER inside a loop), routed scripts
leave the lanes alone: that visit pops its skip and runs on the single stream of before the split, which nothing reads.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from trainer.model.architecture import LaneKind
from trainer.model.attention import Context

Lanes = tuple[Tensor, Tensor]  # each (batch, seq_len, model_dim): what attention reads, what the MLP reads
START = {"routed": 1.1, "sequential": 1.1**0.5}  # of what a lane keeps of itself: once or twice a visit


class LaneBlock(Protocol):
    """The parts of a block that lanes use, each on (batch, seq_len, model_dim)."""

    def mixed(self, x: Tensor, x0: Tensor) -> Tensor: ...
    def attention_update(self, x: Tensor, context: Context) -> Tensor: ...
    def mlp_update(self, x: Tensor, mlp: nn.Module | None) -> Tensor: ...


def lanes_with_skip(kind: LaneKind, has_just_split: bool) -> tuple[bool, bool]:
    """Return which lanes a skip enters; those of the separate kind split after it, and take none later."""
    return {
        "routed": (True, False),
        "sequential": (True, True),
        "separate": (has_just_split, has_just_split),
    }[kind]


def visit_routed(
    block: LaneBlock,
    lanes: Lanes,
    x0: Tensor,
    context: Context,
    mlp: nn.Module | None,
    keep: Tensor,  # (2,): what each lane keeps of itself; perhaps spread over positions, (2, batch, seq_len, 1)
    post: Tensor,  # (2, 2), or spread: of attention and MLP, to the first and the second lane
) -> Lanes:
    """Visit a block with both lanes as the visit before left them."""
    attention = block.attention_update(block.mixed(lanes[0], x0), context)
    fed = block.mlp_update(lanes[1], mlp)
    first = keep[0] * lanes[0] + post[0, 0] * attention + post[1, 0] * fed
    second = keep[1] * lanes[1] + post[0, 1] * attention + post[1, 1] * fed
    return first, second


def visit_sequential(
    block: LaneBlock,
    lanes: Lanes,
    x0: Tensor,
    context: Context,
    mlp: nn.Module | None,
    keep: Tensor,  # (2,): what both lanes keep of themselves, when attention and when the MLP writes
    post: Tensor,  # (2, 2): as above
) -> Lanes:
    """Visit a block with attention first; the MLP reads the second lane after that."""
    attention = block.attention_update(block.mixed(lanes[0], x0), context)
    first = keep[0] * lanes[0] + post[0, 0] * attention
    second = keep[0] * lanes[1] + post[0, 1] * attention
    fed = block.mlp_update(block.mixed(second, x0), mlp)
    return keep[1] * first + post[1, 0] * fed, keep[1] * second + post[1, 1] * fed


def visit_separate(block: LaneBlock, lanes: Lanes, x0: Tensor, context: Context, mlp: nn.Module | None) -> Lanes:
    """Visit a block with two streams of their own, of which only the first is mixed with x0."""
    mixed = block.mixed(lanes[0], x0)
    return mixed + block.attention_update(mixed, context), lanes[1] + block.mlp_update(lanes[1], mlp)
