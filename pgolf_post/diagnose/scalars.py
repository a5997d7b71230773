"""Learned scalars: gains, gates, mixes, lanes, skips, carries. Small tensors in which a model says what it wants.

A tensor of up to MOST_VALUES entries is listed entry by entry; a larger one by its mean and its extremes, one subject
for each leading index (each skip, each of the two rows of a mix).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from pgolf_post.checkpoint import View
from pgolf_post.diagnose.numbers import Number, number

MOST_VALUES = 64


def scalar_tensors(view: View) -> dict[str, Tensor]:
    """Return the tensors with the role control."""
    return {name: tensor for name, tensor in view.tensors.items() if view.family.role(name) == "control"}


def scalar_numbers(view: View) -> list[Number]:
    """Return the numbers of every learned scalar."""
    tensors = scalar_tensors(view)
    numbers = [entry for name, tensor in tensors.items() for entry in _numbers(view, name, tensor.double())]
    return numbers + list(_skips(tensors))


def _numbers(view: View, name: str, tensor: Tensor) -> Iterator[Number]:
    layer = view.family.layer(name)
    if tensor.numel() <= MOST_VALUES:
        for index in _indices(tensor.shape):
            yield number("value", f"{name}{list(index) if index else ''}", float(tensor[index]), layer=layer)
    for index in _indices(tensor.shape[:-1]):
        vector = tensor[index].flatten()
        subject, largest = f"{name}{list(index) if index else ''}", int(vector.abs().argmax())
        yield number("mean", subject, float(vector.mean()), layer=layer)
        yield number("abs_mean", subject, float(vector.abs().mean()), layer=layer)
        yield number("abs_max", subject, float(vector.abs().max()), layer=layer, at=largest)


def _indices(shape: torch.Size) -> list[tuple[int, ...]]:
    """Return every index of a shape in order; one empty index for a scalar."""
    indices: list[tuple[int, ...]] = [()]
    for size in shape:
        indices = [(*index, i) for index in indices for i in range(size)]
    return indices


def _skips(tensors: Mapping[str, Tensor]) -> Iterator[Number]:
    """Yield how far each U-Net skip is open: its gate mixes it by 1 - σ(gate)."""
    for index, gate in enumerate(tensors.get("skip_gates", ())):
        open_share = float((1.0 - torch.sigmoid(gate.double())).mean())
        yield number("skip_open", f"skip_gates[{index}]", open_share)
