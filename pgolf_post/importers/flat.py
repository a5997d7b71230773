"""The flat format: one tensor per matrix, named `blocks.i.attn.c_q.weight` and so on.

Used by the official baseline script and by most records to mid-April (openai/parameter-golf). Apart from the names of
q, k and v, and of control tensors listed below, it is the canonical layout.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from pgolf_post.errors import MismatchError
from pgolf_post.importers.names import rename

RENAMES = {  # foreign suffix: canonical suffix
    ".attn.c_q.weight": ".attn.q.weight",
    ".attn.c_k.weight": ".attn.k.weight",
    ".attn.c_v.weight": ".attn.v.weight",
}

KNOWN = re.compile(
    r"tok_emb\.weight|lm_head\.weight|embed_proj\.weight|head_proj\.weight|skip_weights|skip_gates"
    r"|blocks\.\d+\.(attn_scale|mlp_scale|resid_mix)"
    r"|blocks\.\d+\.attn\.(q_gain|(c_q|c_k|c_v|proj)\.weight)|blocks\.\d+\.mlp\.(fc|proj)\.weight"
)


def recognises(state: Mapping[str, Tensor]) -> bool:
    """A flat state dict has a separate query matrix for block 0."""
    return "blocks.0.attn.c_q.weight" in state


def to_canonical(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Canonical tensors. Raises MismatchError listing tensors that this format does not have."""
    unknown = sorted(name for name in state if not KNOWN.fullmatch(name))
    if unknown:
        raise MismatchError(f"tensors that are not part of the flat format: {', '.join(unknown)}")
    return {rename(name, RENAMES): tensor for name, tensor in state.items()}


def from_canonical(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The flat state dict. Raises MismatchError for tensors that the format cannot hold."""
    back = {canonical: foreign for foreign, canonical in RENAMES.items()}
    state = {rename(name, back): tensor for name, tensor in tensors.items()}
    unknown = sorted(name for name in state if not KNOWN.fullmatch(name))
    if unknown:
        raise MismatchError(f"the flat format has no place for: {', '.join(unknown)}")
    return state
