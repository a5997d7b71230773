"""A curve of a training run: values over optimizer steps, tokens and training seconds, as far as its log tells them.

A log is a set of curves by name. Names are the same for every form of log:

    train_loss, val_loss    nats per token
    val_bpb                 bits per byte; with `_ema` and `_swa` of those views
    others                  as the log names them
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from pgolf_post.errors import MismatchError

Axis = Literal["step", "tokens", "seconds"]
AXES: tuple[Axis, ...] = get_args(Axis)
UNITS = {"train_loss": "nats/token", "val_loss": "nats/token", "val_bpb": "bits/byte", "grad_norm": ""}


@dataclass(frozen=True)
class Point:
    """One value as a log reports it; what the log does not tell of its place is None."""

    value: float
    step: float | None = None
    tokens: float | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Curve:
    """Values at ascending places. All arrays have shape (n,) and type float64; an unknown place is NaN."""

    name: str
    values: np.ndarray
    step: np.ndarray
    tokens: np.ndarray
    seconds: np.ndarray

    @classmethod
    def of(cls, name: str, points: Iterable[Point]) -> Curve:
        """Return the curve of points that stand in order."""
        rows = list(points)
        columns = {
            axis: np.array([getattr(point, axis) for point in rows], dtype=float)  # None becomes NaN
            for axis in AXES
        }
        return cls(name, np.array([point.value for point in rows], dtype=float), **columns)

    def __len__(self) -> int:
        return len(self.values)

    @property
    def unit(self) -> str:
        """The unit of the values; empty where it is none or not known."""
        return next((unit for name, unit in UNITS.items() if self.name.startswith(name)), "")

    def has(self, axis: Axis) -> bool:
        """Whether every place on this axis is known."""
        return len(self) > 0 and bool(np.isfinite(self._column(axis)).all())

    def along(self, axis: Axis) -> np.ndarray:  # (n,) ascending
        """Return the places on an axis. Raises MismatchError if the log does not tell them."""
        if not self.has(axis):
            others = ", ".join(other for other in AXES if self.has(other)) or "none"
            raise MismatchError(f"curve {self.name} has no {axis} for its points; it has {others}", hint="--by step")
        return self._column(axis)

    def _column(self, axis: Axis) -> np.ndarray:
        column: np.ndarray = getattr(self, axis)
        return column

    def facts(self) -> dict[str, Any]:
        """Return the curve as JSON: values and the axes that are known."""
        columns: dict[str, Any] = {axis: self._column(axis).tolist() for axis in AXES if self.has(axis)}
        return {"curve": self.name, "unit": self.unit, "values": self.values.tolist(), **columns}


@dataclass(frozen=True)
class Log:
    """The curves in one log."""

    path: Path
    form: str  # in words: our train.jsonl, a public script's log, a table
    curves: Mapping[str, Curve]
    notes: Sequence[str] = ()  # what was repaired or left out on reading, for people
    phases: Mapping[str, float] | None = None  # phase boundary → its step, where known

    @property
    def name(self) -> str:
        """Name that people call the run by: its folder's name, or the log's."""
        return self.path.name if self.path.is_dir() else self.path.stem

    def curve(self, name: str) -> Curve:
        """Return a curve by name. Raises MismatchError naming those that there are."""
        if name not in self.curves:
            raise MismatchError(f"{self.path} has no curve {name!r}; it has {', '.join(self.curves)}")
        return self.curves[name]

    def facts(self) -> dict[str, Any]:
        """Return the log as JSON."""
        curves = [curve.facts() for curve in self.curves.values()]
        notes = {"notes": list(self.notes), "phases": dict(self.phases or {})}
        return {"log": str(self.path), "form": self.form, "curves": curves, **notes}
