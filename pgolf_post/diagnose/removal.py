"""Removal: how far predictions move if one block adds nothing, as KL divergence from the whole model's.

The block's attention and MLPs give zeros at all its visits; what else it does to the residual (mixing with the
embedding, skips, lanes) stays. So a block whose output projections are zero has a divergence of exactly 0.

Up to a block's first visit the pass without it is the whole model's, so what attention and MLPs gave until then is
taken from that pass. Blocks visited late cost little more than the head.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgolf_post.base.divergence import divergences_of
from pgolf_post.base.progress import progress_bar
from pgolf_post.base.ranks import ALONE
from pgolf_post.checkpoint import View
from pgolf_post.diagnose.activations import BATCH_TOKENS, batches
from pgolf_post.diagnose.numbers import Number, number

Forward = Callable[..., Tensor]

WINDOW_TOKENS = 256  # windows are cut to this length: more of them say more of the noise


@torch.no_grad()
def removal_numbers(view: View, module: Any, tokens: Tensor, num_tokens: int) -> list[Number]:
    """Return the divergence of every block's removal, on the first `num_tokens` of windows cut short."""
    branches = view.family.branches(module)
    windows = short_windows(tokens, num_tokens).to(ALONE.device)
    found: dict[int, list[Tensor]] = {layer: [] for layer in branches}
    with progress_bar("removing blocks", len(windows) * len(branches), "windows") as advance:
        for batch in batches(windows, BATCH_TOKENS) if branches else ():
            replay = Replay(module, branches)
            with replay.recording():
                reference = log_probs(module, batch)
            for layer in branches:
                with replay.without(layer):
                    found[layer].append(divergences_of(reference, log_probs(module, batch)).mean(dim=1).double().cpu())
                advance(len(batch), note=f"block {layer}")
    return [entry for layer, parts in found.items() for entry in _numbers(layer, torch.cat(parts))]


def _numbers(layer: int, means: Tensor) -> Iterator[Number]:  # means: (windows,) nats per token
    subject = f"block {layer}"
    yield number("removal_divergence", subject, max(0.0, float(means.mean())), layer=layer)
    if len(means) > 1:
        error = float(means.std()) / math.sqrt(len(means))
        yield number("removal_divergence_error", subject, error, layer=layer)


def short_windows(tokens: Tensor, num_tokens: int) -> Tensor:  # (windows, seq_len) → (n, at most WINDOW_TOKENS)
    """Return the beginnings of windows, as many as make `num_tokens`, at least one."""
    length = min(WINDOW_TOKENS, tokens.size(1))
    pieces = tokens[:, : tokens.size(1) // length * length].reshape(-1, length)
    wanted = max(1, num_tokens // length)
    spread = torch.linspace(0, len(pieces) - 1, min(wanted, len(pieces))).round().long()
    return pieces[spread]


def log_probs(module: Any, batch: Tensor) -> Tensor:  # (batch, seq_len) → (batch, seq_len, vocab_size) float32
    """Return the model's predictions."""
    return F.log_softmax(module.logits(module.hidden(batch)).float(), dim=-1)


class Replay:
    """Outputs of every attention and MLP in one pass of the whole model, given again until a block is removed."""

    def __init__(self, module: nn.Module, branches: Mapping[int, Sequence[str]]) -> None:
        self.branches = branches
        paths = dict.fromkeys(path for own in branches.values() for path in own)
        self._parts = {path: module.get_submodule(path) for path in paths}
        self._given: list[tuple[str, Tensor]] = []  # in the order of the calls

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep what is given inside the block."""

        def keep(path: str, forward: Forward) -> Forward:
            def recorded(*inputs: Any, **more: Any) -> Tensor:
                output = forward(*inputs, **more)
                self._given.append((path, output.clone()))
                return output

            return recorded

        with self._each(keep):
            yield

    @contextmanager
    def without(self, layer: int) -> Iterator[None]:
        """Let a layer's attention and MLPs give zeros inside the block. Calls before its first one are replayed."""
        silent, calls = set(self.branches[layer]), itertools.count()
        first = next((n for n, (path, _) in enumerate(self._given) if path in silent), len(self._given))

        def replay(path: str, forward: Forward) -> Forward:
            def replayed(*inputs: Any, **more: Any) -> Tensor:
                number = next(calls)
                if path in silent:
                    return torch.zeros_like(self._given[number][1])
                return self._given[number][1].clone() if number < first else forward(*inputs, **more)

            return replayed

        with self._each(replay):
            yield

    @contextmanager
    def _each(self, wrapped: Callable[[str, Forward], Forward]) -> Iterator[None]:
        """Put another function in place of each part's forward inside the block."""
        own = {path: part.forward for path, part in self._parts.items()}
        replaced = {path: own[path] for path, part in self._parts.items() if "forward" in vars(part)}
        try:
            for path, part in self._parts.items():
                part.forward = wrapped(path, own[path])
            yield
        finally:
            for path, part in self._parts.items():
                del part.forward  # the class's own shows again
                if path in replaced:
                    part.forward = replaced[path]
