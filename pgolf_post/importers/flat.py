"""The flat format: one tensor per matrix, named `blocks.i.attn.c_q.weight` and so on.

Used by the official baseline script and by most records to mid-April (openai/parameter-golf). Apart from the names of
q, k and v, and of the parts listed in `names.py`, it is the canonical layout.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from pgolf_post.errors import MismatchError
from pgolf_post.importers.names import (
    PART_RENAMES,
    PARTS,
    gather_parts,
    rename,
    reversed_names,
    spread_parts,
)
from pgolf_post.importers.visits import name_places, unname_places

if TYPE_CHECKING:
    from torch import Tensor

RENAMES = {  # foreign suffix: canonical suffix
    ".attn.c_q.weight": ".attn.q.weight",
    ".attn.c_k.weight": ".attn.k.weight",
    ".attn.c_v.weight": ".attn.v.weight",
    **PART_RENAMES,
}

KNOWN = re.compile(rf"{PARTS}|blocks\.\d+\.attn\.(c_q|c_k|c_v|proj)\.weight|blocks\.\d+\.mlp\.(fc|proj)\.weight")


def recognises(state: Mapping[str, Tensor]) -> bool:
    """Return whether there is a separate query matrix of one of the first blocks (#1204 may have none in block 0)."""
    return any(f"blocks.{layer}.attn.c_q.weight" in state for layer in (0, 1))


def to_canonical(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return canonical tensors. Raises MismatchError listing tensors that this format does not have."""
    unknown = sorted(name for name in state if not KNOWN.fullmatch(name))
    if unknown:
        raise MismatchError(f"tensors that are not part of the flat format: {', '.join(unknown)}")
    return name_places({rename(name, RENAMES): tensor for name, tensor in gather_parts(state).items()})


def from_canonical(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the flat state dict. Raises MismatchError for tensors that the format cannot hold."""
    back = reversed_names(RENAMES)
    state = {rename(name, back): tensor for name, tensor in spread_parts(unname_places(tensors)).items()}
    unknown = sorted(name for name in state if not KNOWN.fullmatch(name))
    if unknown:
        raise MismatchError(f"the flat format has no place for: {', '.join(unknown)}")
    return state
