"""The forward half: sums over every site's input.

A site's input x is seen by a hook on the submodule that multiplies it; q, k and v read the same x and share a site. A
looped layer is visited several times in one forward pass: its sums run over all visits, and the trace of Σxxᵀ is kept
for each visit, which shows their shares of the Hessian.
Source of the use of Σxxᵀ: GPTQ (Frantar et al. 2022, arXiv 2210.17323); of Σ|x|: AWQ (Lin et al. 2023, 2306.00978).
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pgolf_post.calibrate.products import magnitudes
from pgolf_post.calibrate.sums import Sums
from pgolf_post.families import Site


def add_input(sums: Sums, site: str, x: Tensor, visit: int) -> None:  # x: (tokens, in)
    """Add one visit's input to a site's sums."""
    diagonal = sums.add_gram(f"hessian.{site}", x)
    sums.add_at(f"trace.{site}", visit, diagonal.sum())
    total, largest = magnitudes(x)
    sums.add(f"abs.{site}", total)
    sums.add(f"max.{site}", largest)


@contextlib.contextmanager
def observed_inputs(module: nn.Module, sites: Sequence[Site], sums: Sums) -> Iterator[None]:
    """Add each site's input to `sums` during one forward pass inside the block. Visits are counted from its start.

    The head's input is what `hidden` returns, so add_head_input adds it.
    """
    visits: Counter[str] = Counter()

    def hook_for(site: Site) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            add_input(sums, site.name, inputs[0].detach().flatten(0, -2), visits[site.name])
            visits[site.name] += 1

        return hook

    inside = [site for site in sites if not site.is_head]
    with hooks(module.get_submodule(site.module).register_forward_pre_hook(hook_for(site)) for site in inside):
        yield


def add_head_input(sums: Sums, sites: Sequence[Site], hidden: Tensor) -> None:  # hidden: (batch, seq_len, dim)
    """Add what `hidden` returned as the input of the head, whatever module makes the head's product."""
    for site in sites:
        if site.is_head:
            add_input(sums, site.name, hidden.detach().flatten(0, -2), 0)


@contextlib.contextmanager
def hooks(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Remove the hooks at the end of the block."""
    held = list(handles)
    try:
        yield
    finally:
        for handle in held:
            handle.remove()


def forward_batch(
    module: Any,  # a LanguageModel
    sites: Sequence[Site],
    tokens: Tensor,  # (batch, seq_len) int64, on the module's device
    sums: Sums,
) -> None:
    """Run one batch of windows and add the inputs of its sites."""
    with torch.no_grad(), observed_inputs(module, sites, sums):
        add_head_input(sums, sites, module.hidden(tokens))
    sums.add("tokens.all", torch.full((), tokens.numel(), dtype=torch.float64, device=tokens.device))
