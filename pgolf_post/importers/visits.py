"""Tensors that belong to visits instead of layers, as the script of #1204 names them.

Its blocks are numbered by their place in the list of visits, while its matrices are the layers'. So a block without
matrices of its own is a place: `blocks.11.attn_scale` ↔ `places.11.attn_scale`. MLPs of repeated layers are numbered in
the order of `recur_layers`, which no file holds; and block 0 keeps an attention that the script may have switched off.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pgolf_post.errors import MismatchError

if TYPE_CHECKING:
    from torch import Tensor

GAIN = re.compile(r"blocks\.(\d+)\.(?:attn\.)?(q_gain|attn_scale|mlp_scale|resid_mix)")
PLACE = re.compile(r"places\.(\d+)\.(\w+)")
REPEATED = re.compile(r"repeat_mlp\.(\d+)\.(fc|proj)\.weight")
FIRST_ATTENTION = re.compile(r"blocks\.0\.(attn\..*|attn_scale)")


def name_places(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return canonical tensors in which the gains of blocks without matrices are those of places."""
    return {_place_of(name, tensors) or name: tensor for name, tensor in tensors.items()}


def _place_of(name: str, tensors: Mapping[str, Tensor]) -> str | None:
    match = GAIN.fullmatch(name)
    matrices = ("mlp.fc.weight", "attn.q.weight", "attn.c_q.weight")
    if match and not any(f"blocks.{match[1]}.{matrix}" in tensors for matrix in matrices):
        return f"places.{match[1]}.{match[2]}"
    return None


def unname_places(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo `name_places`."""
    named = {}
    for name, tensor in tensors.items():
        match = PLACE.fullmatch(name)
        inner = "attn." if match and match[2] == "q_gain" else ""
        named[f"blocks.{match[1]}.{inner}{match[2]}" if match else name] = tensor
    return named


def name_visits(tensors: Mapping[str, Tensor], stated: Mapping[str, Any]) -> tuple[dict[str, Tensor], list[str]]:
    """Return tensors with repeated MLPs named by their layers, and without an attention that is off; notes on both.

    `stated` is in our names. Raises MismatchError for MLPs of layers that nobody gave.
    """
    notes: list[str] = []
    named = dict(tensors)
    repeated = {name: match for name in tensors if (match := REPEATED.fullmatch(name))}
    if repeated:
        layers = stated.get("recur_layers") or []
        if any(int(match[1]) >= len(layers) for match in repeated.values()):
            raise MismatchError(
                f"{', '.join(repeated)} are MLPs of repeated layers, and recur_layers is {layers or 'not given'}",
                hint="--set recur_layers=4,5: the layers that the run visits again",
            )
        for name, match in repeated.items():
            named[f"override_mlps.{layers[int(match[1])]}_p1.{match[2]}.weight"] = named.pop(name)
        notes.append(f"MLPs of repeated layers named by their layers: {', '.join(map(str, layers))}")
    if stated.get("first_attention") is False:
        off = [name for name in named if FIRST_ATTENTION.fullmatch(name)]
        named = {name: tensor for name, tensor in named.items() if name not in off}
        notes += [f"ignored, because attention of block 0 is off: {', '.join(off)}"] if off else []
    return named, notes
