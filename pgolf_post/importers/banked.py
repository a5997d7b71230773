"""The banked format: all matrices of one shape in one tensor, so that Muon can step them together.

    qo_bank       (2L, dim, dim)      queries of all layers, then output projections
    kv_bank       (2L, kv_dim, dim)   keys of all layers, then values
    mlp_up_bank   (L, hidden, dim)    mlp.fc
    mlp_down_bank (L, dim, hidden)    mlp.proj

Used from the parallel-Muon line on (openai/parameter-golf, PR #1855 among them).
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

BANKS = {  # bank: canonical matrices it holds, in order, each for all layers
    "qo_bank": ("attn.q", "attn.proj"),
    "kv_bank": ("attn.k", "attn.v"),
    "mlp_up_bank": ("mlp.fc",),
    "mlp_down_bank": ("mlp.proj",),
}

FC = re.compile(r"blocks\.\d+\.mlp\.fc\.weight")
KEPT = re.compile(PARTS)


def recognises(state: Mapping[str, Tensor]) -> bool:
    """Return whether there is a query-output bank."""
    return "qo_bank" in state


def to_canonical(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return canonical tensors. Raises MismatchError listing missing banks and unknown tensors."""
    problems = [f"missing {bank}" for bank in BANKS if bank not in state]
    problems += [f"unknown {name}" for name in sorted(state) if name not in BANKS and not KEPT.fullmatch(name)]
    if problems:
        raise MismatchError("not a whole banked state dict: " + "; ".join(problems))
    _require_banks({bank: state[bank] for bank in BANKS})
    rest = gather_parts({name: tensor for name, tensor in state.items() if name not in BANKS})
    canonical = {rename(name, PART_RENAMES): tensor for name, tensor in rest.items()}
    for bank in BANKS:
        canonical.update(_split_bank(bank, state[bank]))
    return name_places(canonical)


def _require_banks(banks: Mapping[str, Tensor]) -> None:
    """Raise MismatchError for banks that do not divide into layers, or into as many as the others."""
    problems, layers = [], {}
    for bank, tensor in banks.items():
        parts, shape = len(BANKS[bank]), tuple(tensor.shape)
        if tensor.ndim != 3 or 0 in shape or shape[0] % parts:
            problems.append(f"{bank} is {shape}; expected ({parts} × layers, out, in)")
        else:
            layers[bank] = shape[0] // parts
    if not problems and len(set(layers.values())) > 1:
        stated = ", ".join(f"{bank} {tuple(banks[bank].shape)} of {number}" for bank, number in layers.items())
        problems = [f"banks of different numbers of layers: {stated}"]
    if problems:
        raise MismatchError("; ".join(problems))


def _split_bank(bank: str, tensor: Tensor) -> dict[str, Tensor]:
    """Return a bank's matrices by canonical name."""
    names = _bank_names(bank, tensor.size(0) // len(BANKS[bank]))
    return {name: matrix.clone() for name, matrix in zip(names, tensor, strict=True)}


def _bank_names(bank: str, num_layers: int) -> list[str]:
    return [f"blocks.{layer}.{part}.weight" for part in BANKS[bank] for layer in range(num_layers)]


def from_canonical(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the banked state dict. Raises MismatchError for tensors that the format cannot hold."""
    import torch  # here, so that naming the formats does not load it

    num_layers = sum(bool(FC.fullmatch(name)) for name in tensors)
    absent = [name for bank in BANKS for name in _bank_names(bank, num_layers) if name not in tensors]
    if absent:
        raise MismatchError(f"the banked format holds every matrix of every layer; missing: {', '.join(absent)}")
    names = {bank: _bank_names(bank, num_layers) for bank in BANKS}
    state = {bank: torch.stack([tensors[name] for name in names[bank]]) for bank in BANKS}
    banked = {name for bank in names.values() for name in bank}
    back = reversed_names(PART_RENAMES)
    spread = spread_parts(unname_places(tensors))
    rest = {rename(name, back): tensor for name, tensor in spread.items() if name not in banked}
    unknown = sorted(name for name in rest if not KEPT.fullmatch(name))
    if unknown:
        raise MismatchError(f"the banked format has no place for: {', '.join(unknown)}")
    return {**state, **rest}
