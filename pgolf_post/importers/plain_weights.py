"""Tensors that are weights, and nothing else: floating point, dense, finite, of a size that a model can use.

A file may hold float8 (every value of which float32 has), or integers without their scales, complex or sparse tensors.
The former are converted, the others refused by name: cast to float in silence they become another model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from pgolf_post.errors import MismatchError, NumericsError
from pgolf_post.families import check_finite

WEIGHTS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
FLOAT8 = (
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
)
LARGEST = torch.finfo(torch.float32).max ** 0.5  # 1.8e19: the square of anything larger is infinite
FLOAT16_LARGEST = torch.finfo(torch.float16).max  # 65,504
SAVE_FLOATS = "save the weights as dense floats, multiplied out: {name: tensor.float() …}; or import the .ptz artifact"


class PlainWeights(NamedTuple):
    """A state dict of plain weights, and what was done to it."""

    state: dict[str, Tensor]
    notes: list[str]


def plain_weights(state: Mapping[str, Tensor], source: str) -> PlainWeights:
    """Return a state dict with float8 tensors in float32; every value is the same.

    Raises MismatchError listing tensors that are no weights, NumericsError for a value that no model can use.
    """
    problems = [f"{name} is {problem}" for name, tensor in state.items() if (problem := _problem(tensor))]
    if problems:
        raise MismatchError(f"{source}: not weights: {'; '.join(problems)}", hint=SAVE_FLOATS)
    narrow = [name for name, tensor in state.items() if tensor.dtype in FLOAT8]
    plain = {name: tensor.detach().float() if name in narrow else tensor.detach() for name, tensor in state.items()}
    notes = [f"float8 converted to float32, every value the same: {', '.join(narrow)}"] if narrow else []
    return PlainWeights(plain, notes + [note for name in plain if (note := check_size(name, plain[name], source))])


def _problem(tensor: Tensor) -> str:
    """Return why a tensor is no weight; nothing if it is one."""
    if tensor.layout != torch.strided:
        return f"sparse ({str(tensor.layout).removeprefix('torch.')})"
    if tensor.is_nested:
        return "a nested tensor"
    if tensor.device.type != "cpu":
        return f"without values (device {tensor.device.type})"
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        return f"a {type(tensor).__name__}"
    if tensor.dtype in (*WEIGHTS, *FLOAT8):
        return ""
    if tensor.dtype.is_complex:
        why = "of which a weight has only the real part"
    else:
        why = "which packs several numbers" if tensor.dtype.is_floating_point else "integers without scales"
    return f"{str(tensor.dtype).removeprefix('torch.')}, {why}"


def check_size(name: str, tensor: Tensor, source: str) -> str:
    """Return a note on a tensor with values beyond float16; nothing if it has none.

    Raises NumericsError naming the first value that is not finite, or whose square float32 cannot hold.
    """
    check_finite(name, tensor, source)
    if tensor.numel() == 0:
        return ""
    flat = tensor.reshape(-1).abs()
    at = int(flat.argmax())
    index, size = [int(i) for i in torch.unravel_index(torch.tensor(at), tensor.shape)], float(flat[at])
    if size > LARGEST:
        raise NumericsError(
            f"{source}: {name}{index} is {tensor[tuple(index)].item():.6g}; the limit is {LARGEST:.2g}, whose square "
            f"is the largest float32 ({int((flat > LARGEST).sum())} such values)",
            hint="import an earlier checkpoint of the run",
        )
    if size > FLOAT16_LARGEST:
        return f"{name}{index} is {tensor[tuple(index)].item():.6g}, beyond float16's largest number, 65,504"
    return ""
