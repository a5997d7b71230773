"""Sequential GPTQ: each block is rounded for the inputs that the quantized blocks before it will give it.

Ordinary GPTQ takes all Hessians from the float model. Once earlier blocks are rounded, later ones see other inputs; so
blocks are taken in the order of the forward pass, and the Hessians of each are collected again, on the same text, with
all blocks before it decoded from their symbols (as Frantar et al. 2022, arXiv 2210.17323, run GPTQ on large models).

What exactly runs:
* All sites of a block see one pass: within it, its own matrices are still float.
* A looped block is visited several times in one pass. Every visit runs with the weights as they are then: blocks
  already rounded are rounded at all their visits, the block itself and those after it are float at all of theirs, and
  its sums run over all its visits. An untied MLP of a later visit is a block of its own, where it is first visited.
* The first block's inputs come from no quantized block: its statistics are those at hand. So a model of one block is
  quantized as ever.
* Matrices outside the blocks (embedding, head, projections) keep the statistics at hand, and are float during the
  passes: a tied embedding is both the first matrix and the last. Low-rank corrections are chosen among all matrices at
  the end, so no pass sees them.
* AWQ takes its Σ|x| from the same passes as the Hessians.
* Row feedback takes the second moments of output gradients from the statistics at hand: those of the float model.

Cost: one forward pass over the text per block but the first. Weights and statistics are left as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from pgolf_post.base.autocast import autocast_dtype
from pgolf_post.base.progress import say
from pgolf_post.base.ranks import ALONE
from pgolf_post.calibrate import Stats
from pgolf_post.calibrate.collect import Observed, collect
from pgolf_post.calibrate.forward import hooks
from pgolf_post.calibrate.packed import pack_upper, unpack_upper
from pgolf_post.calibrate.text import CalibrationSet
from pgolf_post.checkpoint import View
from pgolf_post.errors import MismatchError, SettingsError
from pgolf_post.families import ModelFamily, Site, load_module, swap_weights
from pgolf_post.plan import TensorPlan
from pgolf_post.quantize.gptq.stats_factors import StatsFactors
from pgolf_post.quantize.rows import quantize_part
from pgolf_post.quantize.tensor import QuantizedTensor

PROBE_TOKENS = 8


def quantize_in_order(
    view: View,
    entries: Sequence[TensorPlan],
    stats: Stats,
    factors: StatsFactors,  # of `stats`
    text: CalibrationSet | None,  # on which `stats` were collected
) -> tuple[dict[str, QuantizedTensor], dict[str, Tensor]]:
    """Like rows.quantize_part, block by block.

    Raises SettingsError without a text, MismatchError where the text is not as long as that of the statistics.
    """
    tokens = _require_text(stats, text).tokens
    family = view.family
    module = load_module(view.config, view.tensors, str(view), copy=True).to(ALONE.device)
    blocks = blocks_in_order(module, family)
    members = _members(blocks, entries, family)
    inside = {name for names in members for name in names}
    # Matrices outside the blocks keep the statistics at hand.
    quantized, floats = quantize_part(view, [one for one in entries if one.name not in inside], stats, factors)
    for number, ((layer, sites), names) in enumerate(zip(blocks, members, strict=True)):
        own_stats, own_factors = stats, factors
        if number:
            say(f"block {layer}: Hessians under {number} quantized blocks")
            sums = collect(Observed(module, sites, autocast=autocast_dtype("auto", ALONE.device)), tokens)
            own_stats = _of_block(stats, sites, sums.tensors, tokens.size)
            own_factors = StatsFactors(own_stats)
        chosen = [entry for entry in entries if entry.name in names]
        block, lossless = quantize_part(view, chosen, own_stats, own_factors)
        quantized.update(block)
        floats.update({name: lossless[name] for name in names})
        # Later blocks see this one decoded from its symbols.
        swap_weights(module, {name: torch.from_numpy(tensor.dequantize()) for name, tensor in block.items()})
    in_plan = [entry.name for entry in entries if entry.name in quantized]
    return {name: quantized[name] for name in in_plan}, floats


def _require_text(stats: Stats, text: CalibrationSet | None) -> CalibrationSet:
    if text is None:
        raise SettingsError("a sequential plan collects Hessians as it goes, and this stage was given no text for that")
    if text.tokens.size != stats.num_tokens:
        raise MismatchError(
            f"the statistics are of {stats.num_tokens:,} tokens, the text to go on with has {text.tokens.size:,}",
            hint="use one set of calibration settings for both",
        )
    return text


def blocks_in_order(module: Any, family: ModelFamily) -> list[tuple[int, list[Site]]]:
    """Return (layer, its sites) in the order in which one forward pass first visits them.

    A layer that is visited again for new matrices is listed twice. Tensors without a layer (embedding, head,
    projections) are in no block.
    """
    inside = {site.name: site for site in family.sites(module) if family.layer(site.tensors[0]) is not None}
    seen: dict[str, int] = {}

    def hook_for(site: Site) -> Callable[..., None]:
        def hook(*_: object) -> None:
            seen.setdefault(site.name, family.layer(site.tensors[0]) or 0)

        return hook

    handles = [module.get_submodule(site.module).register_forward_pre_hook(hook_for(site)) for site in inside.values()]
    with hooks(handles), torch.no_grad():
        module.hidden(torch.ones(1, PROBE_TOKENS, dtype=torch.int64, device=next(module.parameters()).device))
    return [(layer, [inside[name] for name in names]) for layer, names in groupby(seen, key=seen.__getitem__)]


def _members(
    blocks: Sequence[tuple[int, list[Site]]], entries: Sequence[TensorPlan], family: ModelFamily
) -> list[set[str]]:
    """Return the tensors of each block: those its sites feed and, at a layer's first block, the layer's others."""
    fed = {name for _, sites in blocks for site in sites for name in site.tensors}
    others: dict[int | None, set[str]] = {}
    for entry in entries:
        if entry.name not in fed:
            others.setdefault(family.layer(entry.name), set()).add(entry.name)
    return [{name for site in sites for name in site.tensors} | others.pop(layer, set()) for layer, sites in blocks]


def _of_block(stats: Stats, sites: Sequence[Site], sums: Mapping[str, Tensor], num_tokens: int) -> Stats:
    """Return statistics of a block's sites alone, rounded as stored ones are."""

    def kind(name: str) -> dict[str, Tensor]:
        return {site.name: sums[f"{name}.{site.name}"].cpu() for site in sites}

    hessians = {name: unpack_upper(pack_upper(matrix)) for name, matrix in kind("hessian").items()}
    return replace(
        stats,
        hessians=hessians,
        abs_sums=kind("abs"),
        abs_maxima=kind("max"),
        pass_traces=kind("trace"),
        num_tokens=num_tokens,
    )
