"""The budget, solved: the one constant c for which the packed artifact fills the bytes that there are.

Bytes fall with log c by N/8 per octave, nearly a straight line, so this is a few steps of the secant method: the first
c from Gaussian entropies, the next ones from builds whose bytes are predicted, the last ones from builds that are
packed for real. Only bytes that were packed and fit end the search. GPTQ's rounding is chaotic, so bytes are rough at
the scale of some tens; the search does not mind, because it asks for a window and not for a point.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pgolf_post.base.progress import say
from pgolf_post.errors import NumericsError, OverBudgetError, SettingsError
from pgolf_post.fit.build import Builder, constants_of
from pgolf_post.fit.estimate import symbol_bits
from pgolf_post.fit.steps import constant_for
from pgolf_post.pack.container import PackSettings, pack
from pgolf_post.pack.report.predict import SizePredictor
from pgolf_post.quantize.tensor import QuantizedModel

WINDOW_BYTES = 2000  # of headroom that may be left
PREDICTED_TO = 0.005  # of the aim: closer than this only packing can tell
MOST_BUILDS = 16
LARGEST_STEP = 2.0  # octaves of c between builds
FIRST_LOSS = 0.005  # nats per token


@dataclass(frozen=True)
class Build:
    """One build of the search."""

    constant: float
    num_bytes: int
    packed: bool  # else predicted


@dataclass(frozen=True)
class Solution:
    """The model that fills the budget."""

    model: QuantizedModel
    data: bytes  # packed
    constant: float
    tries: tuple[Build, ...]


class Search:
    """Looks for the c of one budget."""

    def __init__(self, builder: Builder, kappa: Mapping[str, float], codec: str = "rans") -> None:
        self.builder, self.kappa, self.packing = builder, kappa, PackSettings(codec=codec)
        self.tries: list[Build] = []
        self.predictor = SizePredictor()

    def solve(self, limit: int, on_try: Callable[[Build], object] = lambda found: None) -> Solution:
        """The best artifact of at most `limit` bytes, and of at least `limit` - 2,000.

        Raises OverBudgetError naming the least that it can do, SettingsError for a budget that needs no quantization.
        """
        require_solvable(self.builder, limit)
        aim, constant, best = limit - WINDOW_BYTES / 2, self.first_constant(limit), None
        while len(self.tries) < MOST_BUILDS:
            model = self.builder.model(self.builder.quantize(self.constants(constant)))
            data, found = self._measure(model, constant, aim)
            on_try(found)
            if data is not None and len(data) <= limit:
                if best is None or len(data) > len(best.data):
                    best = Solution(model, data, constant, ())
                if len(data) >= limit - WINDOW_BYTES:
                    break
            constant = self._next(found, aim)
        if best is None:
            raise NumericsError(
                f"no artifact of at most {limit:,} bytes in {MOST_BUILDS} builds; the smallest had "
                f"{min(found.num_bytes for found in self.tries):,}",
                hint="give it more bytes: --budget",
            )
        if len(best.data) < limit - WINDOW_BYTES:
            say(f"{limit - len(best.data):,} bytes are left over: no build came closer in {MOST_BUILDS}")
        return Solution(best.model, best.data, best.constant, tuple(self.tries))

    def packed_bytes(self, model: QuantizedModel) -> int:
        """What a model takes, packed."""
        return len(pack(model, self.packing))

    def constants(self, constant: float) -> dict[str, float]:
        """c/√κ of every matrix."""
        return constants_of(self.builder.parts, constant, self.kappa)

    def first_constant(self, limit: int) -> float:
        """Where Gaussian entropies put the budget: bits fall with log c, so halve the interval."""
        wanted = 8 * (limit - fixed_bytes(self.builder))
        low, high = (math.log2(constant_for(self.builder.num_weights, FIRST_LOSS)) + reach for reach in (-12.0, 12.0))
        for _ in range(12):
            middle = (low + high) / 2
            bits = symbol_bits(self.builder.parts.values(), self.constants(2**middle))
            low, high = (middle, high) if bits > wanted else (low, middle)
        return float(2 ** ((low + high) / 2))

    def _measure(self, model: QuantizedModel, constant: float, aim: float) -> tuple[bytes | None, Build]:
        """Predict while far from the aim; from the first prediction that comes close, pack."""
        if not any(found.packed for found in self.tries):
            predicted = self.predictor.predict_bytes(model)
            if abs(predicted / aim - 1) > PREDICTED_TO and len(self.tries) < MOST_BUILDS // 2:
                self.tries.append(Build(constant, predicted, False))
                return None, self.tries[-1]
        data = pack(model, self.packing)
        self.tries.append(Build(constant, len(data), True))
        return data, self.tries[-1]

    def _next(self, last: Build, aim: float) -> float:
        """The secant through the last try and the nearest other of its kind, or the slope of high rates."""
        slope = -self.builder.num_weights / 8
        others = [found for found in self.tries[:-1] if found.packed == last.packed]
        if others:
            other = min(others, key=lambda found: abs(found.num_bytes - last.num_bytes))
            octaves = math.log2(last.constant / other.constant)
            if abs(octaves) > 0.002:
                measured = (last.num_bytes - other.num_bytes) / octaves
                slope = measured if 2 * slope < measured < slope / 8 else slope
        step = (aim - last.num_bytes) / slope
        return float(last.constant * 2 ** max(-LARGEST_STEP, min(LARGEST_STEP, step)))


def fixed_bytes(builder: Builder) -> int:
    """About what everything but symbols takes: floats, exponents and the manifest."""
    floats = sum(array.nbytes for array in builder.passthrough.values())
    exponents = sum(len(part.shape.rows) + len(part.shape.columns) for part in builder.parts.values())
    return round(0.85 * floats + 0.6 * exponents + 1500)


def require_solvable(builder: Builder, limit: int) -> None:
    """Refuse budgets under one bit per weight, and those that hold every weight in fp16."""
    least = builder.num_weights // 8 + fixed_bytes(builder)
    if limit < least:
        raise OverBudgetError(
            f"{limit:,} bytes for the artifact are less than one bit for each of {builder.num_weights:,} weights; "
            f"the least is about {least:,}",
            hint=f"raise --budget by {least - limit:,} bytes",
        )
    most = 2 * builder.num_weights + fixed_bytes(builder)
    if limit >= most:
        raise SettingsError(
            f"{limit:,} bytes hold all {builder.num_weights:,} weights in fp16 ({most:,}): there is nothing to solve",
            hint="train a larger model, or lower --budget",
        )
