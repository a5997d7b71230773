"""GolfGPT watched: hooks that report a forward pass to the toolkit's Watcher.

The model runs as it always does. Its blocks pass the residual through `stream_in` and `stream_out`, and what they add
through `attn_adds` and `mlp_adds`, where hooks see it. Attention is seen by a backend that reports its queries and keys
before it attends as SDPA does. In lanes, additions are those before the lanes' weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from pgolf_post.watching import Branch, Watcher
from trainer.model.attention_backends import SDPA, sdpa_attend
from trainer.model.block import MLP, Block
from trainer.model.gpt import GolfGPT
from trainer.model.visits import visit_list

Hook = Callable[..., None]


class Pass:
    """The visit that a forward pass is in, counted by the blocks' own reports."""

    def __init__(self, module: GolfGPT) -> None:
        seen: Counter[int] = Counter()
        self.visits: list[tuple[int, int]] = []  # (layer, visit) in the order of a pass
        for layer in visit_list(module.config, module.graph.active_loops):
            seen[layer] += 1
            self.visits.append((layer, seen[layer]))
        self.number = -1

    def advance(self) -> None:
        """Go on to the next visit, from the last one of a pass to the first of the next."""
        self.number = (self.number + 1) % len(self.visits)

    @property
    def visit(self) -> tuple[int, int]:
        """Layer and visit."""
        return self.visits[self.number]


@contextmanager
def watched(module: GolfGPT, watcher: Watcher) -> Iterator[None]:
    """Report every forward pass inside the block to a watcher."""
    now, backend = Pass(module), module.attention_backend
    with ExitStack() as stack:

        def hook(submodule: nn.Module, function: Hook) -> None:
            stack.callback(submodule.register_forward_hook(function).remove)

        for block in module.blocks:
            assert isinstance(block, Block)
            hook(block.stream_in, _enters(now, watcher))
            hook(block.stream_out, _leaves(now, watcher))
            hook(block.attn_adds, _adds(now, watcher, "attention"))
            hook(block.mlp_adds, _adds(now, watcher, "mlp"))
        for name, submodule in module.named_modules():
            if isinstance(submodule, MLP):
                _hook_units(name, submodule, now, watcher, hook)

        def attend(q: Tensor, k: Tensor, v: Tensor, within: Any) -> Tensor:
            watcher.attends(*now.visit, q, k, within)
            return sdpa_attend(q, k, v, within)

        module.attention_backend = replace(SDPA, attend=attend)
        stack.callback(setattr, module, "attention_backend", backend)
        yield


def _streams(residual: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return residual if isinstance(residual, tuple) else (residual,)


def _enters(now: Pass, watcher: Watcher) -> Hook:
    def hook(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        now.advance()
        watcher.enters(*now.visit, _streams(output))

    return hook


def _leaves(now: Pass, watcher: Watcher) -> Hook:
    return lambda _, inputs, output: watcher.leaves(*now.visit, _streams(output))


def _adds(now: Pass, watcher: Watcher, branch: Branch) -> Hook:
    return lambda _, inputs, output: watcher.adds(*now.visit, branch, output)


def _hook_units(name: str, mlp: MLP, now: Pass, watcher: Watcher, hook: Callable[[nn.Module, Hook], None]) -> None:
    """Report an MLP's units: what its activation reads, kept until the projection shows what came of it."""
    before: list[Tensor] = []
    hook(mlp.gate if mlp.gated else mlp.fc, lambda _, inputs, output: before.append(output))
    hook(mlp.proj, lambda _, inputs, output: watcher.fires(name, now.visit[0], before.pop(), inputs[0]))
