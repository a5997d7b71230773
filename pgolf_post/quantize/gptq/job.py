"""GPTQ job of one matrix, checked before anything is rounded."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pgolf_post.errors import MismatchError, NumericsError
from pgolf_post.quantize.gptq.factorize import LDLFactor, is_finite
from pgolf_post.quantize.gptq.trellis import Trellis
from pgolf_post.quantize.gptq.viterbi import LARGEST, check_largest


@dataclass(frozen=True)
class Job:
    """One matrix to quantize against one factor."""

    name: str
    weight: Tensor  # (out, in) float32
    factor: LDLFactor
    steps: Tensor  # (out,) per row, or whatever broadcasts to (out, in); of the union grid where there is a trellis
    largest: int | None  # symbols stay within ±largest; None: within what 16 bits hold
    trellis: Trellis | None = None
    row_feedback: Tensor | None = None  # (out, out) float32: upper triangular, ones on its diagonal; see coupled.py

    def __post_init__(self) -> None:
        """Raises MismatchError for shapes that do not fit, NumericsError for values that cannot be quantized."""
        shape = tuple(self.weight.shape)
        if len(shape) != 2 or shape[1] != len(self.factor.order):
            raise MismatchError(f"{self.name}: a weight of shape {shape} for a Hessian of {len(self.factor.order)}")
        check_largest(self.largest)
        if not is_finite(self.weight):
            self._refuse("weight", self.weight, ~torch.isfinite(self.weight))
        if not is_finite(self.steps) or not (self.steps > 0).all():
            self._refuse("step", self.steps, ~(torch.isfinite(self.steps) & (self.steps > 0)))
        self.spread(self.steps)
        if self.row_feedback is not None:
            self._require_couplable(self.row_feedback)

    def _require_couplable(self, row_feedback: Tensor) -> None:
        if tuple(row_feedback.shape) != (len(self.weight),) * 2:
            raise MismatchError(
                f"{self.name}: a row feedback of shape {tuple(row_feedback.shape)} for {len(self.weight)} rows"
            )
        if self.weight.device.type != "cpu":
            raise MismatchError(f"{self.name}: coupled rows are rounded on the CPU, not on {self.weight.device}")
        if not is_finite(row_feedback):
            self._refuse("row feedback", row_feedback, ~torch.isfinite(row_feedback))

    @property
    def along_diagonals(self) -> bool:
        """Whether the trellis runs along anti-diagonals, which takes the matrix in one piece (diagonals.py)."""
        return self.trellis is not None and self.trellis.diagonal

    def _refuse(self, what: str, values: Tensor, bad: Tensor) -> None:
        place = bad.nonzero()[0].tolist()
        value = float(values[tuple(place)])
        raise NumericsError(f"{self.name}: its {what} at {place} is {value:g}; {int(bad.sum())} such values")

    def spread(self, values: Tensor) -> Tensor:  # (out,), or broadcasts to (out, in) → (1 or out, 1 or in)
        """Return values in two dimensions. Raises MismatchError if they do not fit the weight."""
        matrix = values[:, None] if values.dim() == 1 else values
        if matrix.dim() != 2 or any(a not in (1, b) for a, b in zip(matrix.shape, self.weight.shape, strict=True)):
            shapes = f"{tuple(values.shape)} for a weight of {tuple(self.weight.shape)}"
            raise MismatchError(f"{self.name}: steps of shape {shapes}")
        return matrix

    @property
    def limit(self) -> int:
        """The largest |symbol|, whether bounded by `largest` or by 16 bits."""
        return LARGEST if self.largest is None else self.largest
