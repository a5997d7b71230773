"""Removal: how far predictions move if one block adds nothing, as KL divergence from the whole model's.

The block's attention and MLPs give zeros at all its visits; what else it does to the residual (mixing with the
embedding, skips, lanes) stays. So a block whose output projections are zero has a divergence of exactly 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgolf_post.base.divergence import divergences_of
from pgolf_post.base.progress import progress_bar
from pgolf_post.base.ranks import ALONE
from pgolf_post.calibrate.forward import hooks
from pgolf_post.checkpoint import View
from pgolf_post.diagnose.activations import BATCH_TOKENS, batches
from pgolf_post.diagnose.numbers import Number, number

WINDOW_TOKENS = 256  # windows are cut to this length: more of them say more of the noise


@torch.no_grad()
def removal_numbers(view: View, module: Any, tokens: Tensor, num_tokens: int) -> list[Number]:
    """Return the divergence of every block's removal, on the first `num_tokens` of windows cut short."""
    branches = view.family.branches(module)
    windows = short_windows(tokens, num_tokens).to(ALONE.device)
    found: dict[int, list[Tensor]] = {layer: [] for layer in branches}
    with progress_bar("removing blocks", len(windows) * len(branches), "windows") as advance:
        for batch in batches(windows, BATCH_TOKENS) if branches else ():
            reference = log_probs(module, batch)
            for layer, paths in branches.items():
                with silenced(module, paths):
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


@contextmanager
def silenced(module: nn.Module, paths: Sequence[str]) -> Iterator[None]:
    """Make submodules give zeros inside the block."""

    def zeros(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return torch.zeros_like(output)

    with hooks(module.get_submodule(path).register_forward_hook(zeros) for path in paths):
        yield
