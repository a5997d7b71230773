"""Sums of calibration by key: adding a chunk of text to them, and merging the sums of two texts.

Everything is un-normalised, so H(A) + H(B) = H(A ∪ B) for chunks, ranks, interrupted runs and machines alike; only
maxima merge by maximum. Keys are `kind.name`; the kinds are

    hessian.SITE     Σxxᵀ (in, in), upper triangle   abs.SITE, max.SITE   Σ|x|, max|x| (in,)
    trace.SITE       Σ|x|² of each visit (passes,)   tokens.all           tokens seen ()
    rows.TENSOR      Σδ² (out,)                      weighted.TENSOR      Σ s·xxᵀ (in, in), upper triangle
    outputs.TENSOR   Σδδᵀ (out, out), upper triangle
    counts.TABLE     how often each row was looked up, lookup_rows.TABLE mean over columns of Σg² of each row (rows,)
    lookup.TABLE     Σggᵀ of the gradient g at the lookup's output (width, width), upper triangle
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from pgolf_post.calibrate.products import upper_gram
from pgolf_post.errors import NumericsError

MATRICES = ("hessian", "weighted", "outputs", "lookup")  # kinds of which only the upper triangle is defined
MAXIMA = ("max",)
FISHER_KINDS = ("rows", "weighted", "outputs", "counts", "lookup_rows", "lookup")
ADD_ROWS = 256  # rows of a triangle that are added at a time


def kind_of(key: str) -> str:
    """Return the part of a key before its first dot."""
    return key.partition(".")[0]


class Sums:
    """Float64 sums by key, on the device of what was added first.

    `products_in` is the type that a GPU multiplies in: that of the model's own products.
    """

    def __init__(self, tensors: Mapping[str, Tensor] | None = None, products_in: torch.dtype = torch.float32) -> None:
        self.tensors: dict[str, Tensor] = dict(tensors or {})
        self.products_in = products_in

    def __getitem__(self, key: str) -> Tensor:
        return self.tensors[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def to(self, device: torch.device) -> None:
        """Move everything to a device."""
        self.tensors = {key: tensor.to(device) for key, tensor in self.tensors.items()}

    def add(self, key: str, value: Tensor) -> None:
        """Add a chunk's sum (or, for a maximum, keep the larger)."""
        if key not in self.tensors:
            self.tensors[key] = value.to(torch.float64, copy=True)
        elif kind_of(key) in MAXIMA:
            torch.maximum(self.tensors[key], value.double(), out=self.tensors[key])
        elif kind_of(key) in MATRICES:
            _add_upper(self.tensors[key], value)
        else:
            self.tensors[key] += value

    def add_gram(self, key: str, x: Tensor) -> Tensor:  # x: (tokens, n) → (n,) float32
        """Add Σxxᵀ of a chunk; return its diagonal, Σx²."""
        product = upper_gram(x, self.products_in)
        self.add(key, product)
        return product.diagonal()

    def add_at(self, key: str, index: int, value: Tensor) -> None:  # value: ()
        """Add to one entry of a vector, extending the vector if it is too short."""
        held = self.tensors.get(key, torch.zeros(0, dtype=torch.float64, device=value.device))
        if index >= len(held):
            held = torch.cat([held, held.new_zeros(index + 1 - len(held))])
        held[index] += value
        self.tensors[key] = held

    def merge(self, other: Sums) -> None:
        """Add the sums of another text."""
        for key, value in other.tensors.items():
            self.add(key, value)

    def require_finite(self) -> None:
        """Raise NumericsError naming the first sum that holds NaN or infinity."""
        for key, value in self.tensors.items():
            bad = int((~torch.isfinite(value)).sum())
            if bad:
                kind, _, name = key.partition(".")
                raise NumericsError(
                    f"statistics {kind!r} of {name!r} hold {bad} of {value.numel()} values that are NaN or infinite",
                    hint="the weights overflow on this text: take another checkpoint (pgolf-post checkpoint list), or "
                    "--calibration-precision fp32",
                )


def _add_upper(total: Tensor, value: Tensor) -> None:
    """Add `value` to `total` on and above the diagonal, in place; a GPU adds all of it, in one launch."""
    if total.device.type != "cpu":
        total += value
        return
    for low in range(0, len(total), ADD_ROWS):
        total[low : low + ADD_ROWS, low:] += value[low : low + ADD_ROWS, low:]
