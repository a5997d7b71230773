"""Groups of quantized tensors: by role, by block, or each tensor for itself."""

from __future__ import annotations

from typing import Literal

from pgolf_post.errors import PgolfError
from pgolf_post.families import ModelFamily
from pgolf_post.quantize.tensor import LOW_RANK, QuantizedModel

ALL = "all"

By = Literal["role", "layer", "tensor"]


def groups(model: QuantizedModel, family: ModelFamily, by: By) -> dict[str, list[str]]:
    """Return group → the names of its quantized tensors, low-rank corrections beside what they correct; `all` last.

    Raises PgolfError if nothing is quantized.
    """
    members: dict[str, list[str]] = {}
    for name in model.quantized:
        members.setdefault(_group(corrected(name), family, by), []).append(name)
    if not members:
        raise PgolfError("the plan quantizes no tensor: there is nothing to attribute")
    return {**members, ALL: list(model.quantized)}


def _group(name: str, family: ModelFamily, by: By) -> str:
    if by == "tensor":
        return name
    if by == "role":
        return family.role(name)
    layer = family.layer(name)
    return "outside the blocks" if layer is None else f"block {layer}"


def corrected(name: str) -> str:
    """Return the matrix that a quantized tensor belongs to: itself, or what its low-rank factor corrects."""
    for suffix in LOW_RANK:
        name = name.removesuffix(suffix)
    return name
