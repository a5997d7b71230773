"""Numbers on a command line: NaN and infinity are words of Python's `float`, and within every range that has no end.

A cost of NaN dollars an hour or a time limit of infinity minus one would be computed with, and written to the ledger.
"""

from __future__ import annotations

import math
from typing import Any

import click


class FiniteFloat(click.FloatRange):
    """A finite number, in a range or in none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the number. Fails as click's types do, for NaN and infinity too."""
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number

    def __repr__(self) -> str:
        return f"<FiniteFloat {self._describe_range() or 'x'}>"


class Numbers(click.ParamType):
    """Finite numbers with commas between them: 0.05,0.10."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        """Return the numbers. Fails as click's types do, for NaN and infinity too."""
        try:
            numbers = tuple(float(part) for part in str(value).split(","))
        except ValueError:
            numbers = (math.nan,)
        if not all(math.isfinite(number) for number in numbers):
            self.fail(f"{value!r}: expected numbers with commas between them, for example 0.05,0.10", param, ctx)
        return numbers
