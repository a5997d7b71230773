"""Learned scalars as keys of a recipe: what a copy of the model needs to begin with them, or to keep them frozen.

A recipe can hold the carry of depth recurrence (β and α, frozen, of each pass) and the starting gain of each head's
query. Other learned scalars are printed as comments, so that nothing is left out unsaid.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from pgolf_post.checkpoint import View
from pgolf_post.diagnose.scalars import MOST_VALUES, scalar_tensors
from pgolf_post.errors import NotFoundError

CARRY = {"recur_beta": "carry_beta", "recur_alpha": "carry_alpha"}
GAIN = "attn.q_gain"


def recipe_toml(view: View, digits: int) -> str:
    """Return TOML with a [model] table, rounded to this many decimals. Raises NotFoundError without learned scalars."""
    tensors = scalar_tensors(view)
    if not tensors:
        raise NotFoundError(f"{view} has no learned scalars", hint=f"pgolf-post diagnose {view.checkpoint.path}")
    num_layers = 1 + max((view.family.layer(name) or 0 for name in view.tensors), default=0)
    taken = [name for name in tensors if name in CARRY or name.endswith(GAIN)]
    lines = ["[model]", *_carry(tensors, digits), *_gain(tensors, num_layers, digits)]
    rest = [f"# {line}" for name in tensors if name not in taken for line in _comment(name, tensors[name], digits)]
    return "\n".join([*lines, *(["# no recipe key takes these:"] if rest else []), *rest])


def _carry(tensors: Mapping[str, Tensor], digits: int) -> Iterator[str]:
    """Yield the frozen carry; one that differs by re-visit has a list for each."""
    if not all(name in tensors for name in CARRY):
        return
    yield 'carry = "frozen"'
    if tensors["recur_beta"].ndim == 2:
        yield "carry_per_pass = true"
    yield from (f"{key} = {_rounded(tensors[name], digits)}" for name, key in CARRY.items())


def _gain(tensors: Mapping[str, Tensor], num_layers: int, digits: int) -> Iterator[str]:
    """Yield the gains of every layer's heads; their mean where some layer has no attention."""
    gains = {name: tensor.double() for name, tensor in tensors.items() if name.endswith(GAIN)}
    if not gains:
        return
    layers = [gains.get(f"blocks.{layer}.{GAIN}") for layer in range(num_layers)]
    if all(layer is not None for layer in layers):
        rows = [_rounded(layer, digits) for layer in layers if layer is not None]
        yield f"q_gain_init = {rows}"
        return
    values = [value for tensor in gains.values() for value in tensor.tolist()]
    spread = f"{round(min(values), digits)} … {round(max(values), digits)}"
    yield f"q_gain_init = {round(sum(values) / len(values), digits)}  # mean of {len(values)} heads, {spread}"
    yield from (f"# {name} = {_rounded(tensor, digits)}" for name, tensor in gains.items())


def _comment(name: str, tensor: Tensor, digits: int) -> Iterator[str]:
    if tensor.numel() <= MOST_VALUES:
        yield f"{name} = {_rounded(tensor, digits)}"
        return
    rows = tensor.double().reshape(-1, tensor.shape[-1])
    for number, row in enumerate(rows):
        place = f"[{number}]" if len(rows) > 1 else ""
        low, mean, high = (round(float(value), digits) for value in (row.min(), row.mean(), row.max()))
        yield f"{name}{place}: {len(row)} values, {low} … {high}, mean {mean}"


def _rounded(tensor: Tensor, digits: int) -> Any:
    return _round(tensor.double().tolist(), digits)


def _round(value: Any, digits: int) -> Any:
    return [_round(each, digits) for each in value] if isinstance(value, list) else round(value, digits)
