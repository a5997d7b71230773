"""Solve the budget: find the one constant c for which the packed artifact fills the bytes that there are.

Bytes fall with log c by N/8 per octave, nearly a straight line, so this is a few steps of the secant method: the first
c from Gaussian entropies, the next ones from builds whose bytes are predicted, the last ones from builds that are
packed for real. Only bytes that were packed and fit end the search. GPTQ's rounding is chaotic, so bytes are rough at
the scale of some tens; the search does not mind, because it asks for a window and not for a point.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from pgolf_post.base.progress import say
from pgolf_post.errors import OverBudgetError, SettingsError
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
MOST_BITS = 8  # of a weight, where matrices of zeros leave more bytes than the others need


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
    builds: tuple[Build, ...]


class Search:
    """Looks for the c of a budget."""

    def __init__(self, builder: Builder, kappa: Mapping[str, float], codec: str = "rans") -> None:
        self.builder, self.kappa, self.packing = builder, kappa, PackSettings(codec=codec)
        self.predictor = SizePredictor()
        self.pack_seconds = 0.0  # of all builds that were packed

    def solve(self, limit: int, on_build: Callable[[Build], object] = lambda build: None) -> Solution:
        """Return the best artifact of at most `limit` bytes, and of at least `limit` - 2,000.

        Raises OverBudgetError naming the least that it can do, SettingsError for a budget that needs no quantization.
        """
        require_solvable(self.builder, limit)
        if not self.builder.matrices:
            return self._nothing_to_round(limit)
        limit = useful_bytes(self.builder, limit)
        aim, constant = limit - WINDOW_BYTES / 2, self.first_constant(limit)
        best: Solution | None = None
        builds: list[Build] = []
        while len(builds) < MOST_BUILDS:
            model = self.builder.model(self.builder.quantize(self.constants(constant)))
            data, build = self._measure(model, constant, aim, builds)
            builds.append(build)
            on_build(build)
            if data is not None and len(data) <= limit:
                if best is None or len(data) > len(best.data):
                    best = Solution(model, data, constant, ())
                if len(data) >= limit - WINDOW_BYTES:
                    break
            constant = self._next(builds, aim)
        if best is None:
            least = min(build.num_bytes for build in builds)
            raise OverBudgetError(
                f"no artifact of at most {limit:,} bytes in {MOST_BUILDS} builds; the smallest had {least:,}",
                hint=f"raise --budget by {max(WINDOW_BYTES, least - limit):,} bytes",
            )
        if len(best.data) < limit - WINDOW_BYTES:
            say(f"{limit - len(best.data):,} bytes are left over: no build came closer in {MOST_BUILDS}")
        return replace(best, builds=tuple(builds))

    def _nothing_to_round(self, limit: int) -> Solution:
        """Return the model whose matrices are all zeros. Raises OverBudgetError if its floats do not fit."""
        model = self.builder.model({})
        data = self._packed(model)
        if len(data) > limit:
            raise OverBudgetError(
                f"all matrices are zeros, and what is left takes {len(data):,} of {limit:,} bytes for the artifact",
                hint=f"raise --budget by {len(data) - limit:,} bytes",
            )
        say(f"{limit - len(data):,} bytes are left over: all matrices are stored as zeros")
        return Solution(model, data, 0.0, (Build(0.0, len(data), True),))

    def packed_bytes(self, model: QuantizedModel) -> int:
        """Return the bytes that a model takes, packed."""
        return len(self._packed(model))

    def _packed(self, model: QuantizedModel) -> bytes:
        started = time.perf_counter()
        data = pack(model, self.packing)
        self.pack_seconds += time.perf_counter() - started
        return data

    def constants(self, constant: float) -> dict[str, float]:
        """Return c/√κ of every matrix."""
        return constants_of(self.builder.matrices, constant, self.kappa)

    def first_constant(self, limit: int) -> float:
        """Return the c at which Gaussian entropies fill the budget; bits fall with log c, so the interval is halved."""
        wanted = 8 * (limit - fixed_bytes(self.builder))
        low, high = (math.log2(constant_for(self.builder.num_weights, FIRST_LOSS)) + reach for reach in (-12.0, 12.0))
        for _ in range(12):
            middle = (low + high) / 2
            bits = symbol_bits(self.builder.matrices.values(), self.constants(2**middle))
            low, high = (middle, high) if bits > wanted else (low, middle)
        return float(2 ** ((low + high) / 2))

    def _measure(
        self, model: QuantizedModel, constant: float, aim: float, before: Sequence[Build]
    ) -> tuple[bytes | None, Build]:
        """Predict the bytes while far from the aim; pack from the first prediction on that comes close."""
        if not any(build.packed for build in before):
            predicted = self.predictor.predict_bytes(model)
            if abs(predicted / aim - 1) > PREDICTED_TO and len(before) < MOST_BUILDS // 2:
                return None, Build(constant, predicted, False)
        data = self._packed(model)
        return data, Build(constant, len(data), True)

    def _next(self, builds: Sequence[Build], aim: float) -> float:
        """Return the next c: by the secant through the last build and the nearest other of its kind.

        Where there is no other, or their slope makes no sense, by the slope of high rates.
        """
        *others, last = builds
        slope = -self.builder.num_weights / 8
        alike = [build for build in others if build.packed == last.packed]
        if alike:
            other = min(alike, key=lambda build: abs(build.num_bytes - last.num_bytes))
            octaves = math.log2(last.constant / other.constant)
            if abs(octaves) > 0.002:
                measured = (last.num_bytes - other.num_bytes) / octaves
                slope = measured if 2 * slope < measured < slope / 8 else slope
        step = (aim - last.num_bytes) / slope
        return float(last.constant * 2 ** max(-LARGEST_STEP, min(LARGEST_STEP, step)))


def fixed_bytes(builder: Builder) -> int:
    """Return about what everything but symbols takes: floats, exponents and the manifest."""
    floats = sum(array.nbytes for array in builder.passthrough.values())
    exponents = sum(len(matrix.steps.rows) + len(matrix.steps.columns) for matrix in builder.matrices.values())
    return round(0.85 * floats + 0.6 * exponents + 1500)


def require_solvable(builder: Builder, limit: int) -> None:
    """Raise for budgets under one bit per weight, and for those that hold every weight in fp16."""
    least = builder.num_weights // 8 + fixed_bytes(builder)
    if limit < least:
        raise OverBudgetError(
            f"{limit:,} bytes for the artifact are less than one bit for each of {builder.num_weights:,} weights; "
            f"the least is about {least:,}",
            hint=f"raise --budget by {least - limit:,} bytes",
        )
    num_weights = builder.num_weights + sum(tensor.symbols.size for tensor in builder.zeros.values())
    most = 2 * num_weights + fixed_bytes(builder)
    if limit >= most:
        raise SettingsError(
            f"{limit:,} bytes hold all {num_weights:,} weights in fp16 ({most:,}): there is nothing to solve",
            hint=f"lower --budget by more than {limit - most:,} bytes, or train a larger model",
        )


def useful_bytes(builder: Builder, limit: int) -> int:
    """Return the bytes to fill: the limit, or less where most matrices are zeros and the others cannot use it."""
    most = builder.num_weights * MOST_BITS // 8 + fixed_bytes(builder)
    if not builder.zeros or limit <= most:
        return limit
    say(
        f"{limit - most:,} bytes are left over: {len(builder.zeros)} matrices are stored as zeros, and "
        f"{MOST_BITS} bits for each of the other {builder.num_weights:,} weights take {most:,}"
    )
    return most
