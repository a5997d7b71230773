"""Solve the budget: find the one constant c for which the packed artifact fills the bytes that there are.

Bytes fall with log c by N/8 per octave at high rates, nearly a straight line, so this is a few steps of the secant
method: the first c and slope from Gaussian entropies, the next c from builds whose bytes are predicted, the last ones
from builds that are packed for real. Only bytes that were packed and fit end the search. GPTQ's rounding is chaotic, so
bytes are rough at the scale of some tens; the search does not mind, because it asks for a window and not for a point.
The number of states of a trellis decides what is lost at some c, hardly what it takes (0.1 %). So where more of them
take longer, few states find c, and all of them build what is kept.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from pgolf_post.base.progress import say
from pgolf_post.errors import OverBudgetError
from pgolf_post.fit.build import Builder, constants_of
from pgolf_post.fit.estimate import Spread, spreads, symbol_bits
from pgolf_post.fit.limits import fixed_bytes, require_solvable, useful_bytes
from pgolf_post.fit.steps import constant_for
from pgolf_post.pack.container import PackSettings, pack
from pgolf_post.pack.report.predict import SizePredictor
from pgolf_post.quantize.gptq.trellis import DIAGONALS
from pgolf_post.quantize.rows import entropy_bits
from pgolf_post.quantize.tensor import QuantizedModel

WINDOW_BYTES = 2000  # of headroom that may be left
NEAR = 0.015  # of the aim: closer than this only packing can tell
ROUGHLY = 0.005  # of the aim, where predictions alone compare
MOST_BUILDS = 16
NUDGE = 2**0.125  # of c, for the slope of bits
FEW_STATES = 8  # of a trellis down the columns; along diagonals 256 take hardly longer than 8
MOST_ROUGH = 4
MOST_MIXES = 3
LARGEST_STEP = 2.0  # octaves of c between builds
FIRST_LOSS = 0.005  # nats per token


@dataclass(frozen=True)
class Build:
    """One build of the search."""

    constant: float
    num_bytes: int
    packed: bool  # else predicted
    states: int  # of the trellis


@dataclass(frozen=True)
class Solution:
    """The model that fills the budget."""

    model: QuantizedModel
    data: bytes  # packed
    constant: float
    builds: tuple[Build, ...]


@dataclass(frozen=True)
class Rough:
    """A build with few states, about as large as a budget."""

    model: QuantizedModel
    num_bytes: int  # predicted
    aim: float  # bytes
    constant: float


class Search:
    """Looks for the c of a budget."""

    def __init__(self, builder: Builder, kappa: Mapping[str, float], codec: str = "rans") -> None:
        self.builder, self.kappa, self.packing = builder, kappa, PackSettings(codec=codec)
        self.predictor = SizePredictor()
        self.pack_seconds = 0.0  # of all builds that were packed

    def rough(self, limit: int, start: float | None = None) -> Rough:
        """Return a build with few states whose predicted bytes are within 0.5 % of a budget, or the last of several.

        `start` is a c that may be near. Raises what `solve` does.
        """
        require_solvable(self.builder, limit)
        aim, constant = limit - WINDOW_BYTES / 2, start or self.first_constant(limit)
        states, builds = self._few_states, list[Build]()
        while True:
            model = self.builder.model(self.builder.quantize(self.constants(constant), states=states, brief=True))
            builds.append(Build(constant, self.predictor.predict_bytes(model), False, states))
            if abs(builds[-1].num_bytes / aim - 1) <= ROUGHLY or len(builds) == MOST_ROUGH:
                return Rough(model, builds[-1].num_bytes, aim, constant)
            constant = self._next(builds, aim)

    def solve(
        self,
        limit: int,
        on_build: Callable[[Build], object] = lambda build: None,
        start: float | None = None,  # a c that may be near
    ) -> Solution:
        """Return the best artifact of at most `limit` bytes, and of at least `limit` - 2,000.

        Raises OverBudgetError naming the least that it can do, SettingsError for a budget that needs no quantization.
        """
        require_solvable(self.builder, limit)
        if not self.builder.matrices:
            return self._nothing_to_round(limit)
        limit = useful_bytes(self.builder, limit)
        aim, constant = limit - WINDOW_BYTES / 2, start or self.first_constant(limit)
        every, states = self.builder.settings.trellis_states, self._few_states
        best: Solution | None = None
        builds: list[Build] = []
        whole: list[Solution] = []  # by all states
        while len(builds) < MOST_BUILDS and (best is None or len(best.data) < limit - WINDOW_BYTES):
            model = self.builder.model(self.builder.quantize(self.constants(constant), states=states, brief=True))
            data, build = self._measure(model, constant, aim, builds, states)
            builds.append(build)
            on_build(build)
            constant = self._next(builds, aim)
            if data is None or states != every:
                states = every if self._near(builds, aim) else states
                continue
            whole.append(Solution(model, data, build.constant, ()))
            found = [*([best] if best else []), whole[-1], *self._mixed(whole, limit)]
            fitting = [solution for solution in found if len(solution.data) <= limit]
            best = max(fitting, key=lambda solution: len(solution.data), default=None)
        if best is None:
            least = min(build.num_bytes for build in builds if build.packed)
            raise OverBudgetError(
                f"no artifact of at most {limit:,} bytes in {MOST_BUILDS} builds; the smallest had {least:,}",
                hint=f"raise --budget by {max(WINDOW_BYTES, least - limit):,} bytes",
            )
        if len(best.data) < limit - WINDOW_BYTES:
            say(f"{limit - len(best.data):,} bytes are left over: no build came closer in {MOST_BUILDS}")
        model = self.builder.model(self.builder.described(best.model.quantized))
        return replace(best, model=model, builds=tuple(builds))

    def _mixed(self, whole: Sequence[Solution], limit: int) -> Iterator[Solution]:
        """Yield models whose matrices come from two builds, one over the budget and one under it, until one fills it.

        c of the two differ by a percent or so, which costs nothing. A third build would miss as they did, by chance.
        """
        aim, offset = limit - WINDOW_BYTES / 2, 0.0
        above = [solution for solution in whole if len(solution.data) > limit]
        below = [solution for solution in whole if len(solution.data) <= limit]
        if not above or not below or len(below[-1].data) >= limit - WINDOW_BYTES:
            return
        over = min(above, key=lambda solution: len(solution.data))
        under = max(below, key=lambda solution: len(solution.data))
        costs = {name: _symbol_bytes(over, name) - _symbol_bytes(under, name) for name in self.builder.matrices}
        for _ in range(MOST_MIXES):
            expected, mixed = len(under.data) + offset, dict(under.model.quantized)
            for name in sorted(costs, key=lambda name: -costs[name]):
                if costs[name] > 0 and expected + costs[name] <= aim:
                    mixed[name] = over.model.quantized[name]
                    expected += costs[name]
            model = self.builder.model(mixed)
            solution = Solution(model, self._packed(model), under.constant, ())
            say(f"c {over.constant:.3e} and {under.constant:.3e}, by matrix: {len(solution.data):,} bytes packed")
            yield solution
            if limit - WINDOW_BYTES <= len(solution.data) <= limit:
                return
            offset += len(solution.data) - expected

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
        return Solution(model, data, 0.0, (Build(0.0, len(data), True, 0),))

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
            low, high = (middle, high) if self._bits(2**middle) > wanted else (low, middle)
        return float(2 ** ((low + high) / 2))

    @property
    def _few_states(self) -> int:
        settings = self.builder.settings
        states = settings.trellis_states
        return states if settings.lane_rows == DIAGONALS else min(states, FEW_STATES)

    def _near(self, builds: Sequence[Build], aim: float) -> bool:
        """Whether few states have come near enough for all of them to go on, or too often not."""
        return abs(builds[-1].num_bytes / aim - 1) <= NEAR or len(builds) >= MOST_BUILDS // 2

    def _bits(self, constant: float) -> float:
        """Return the bits of all symbols at c by Gaussian entropies."""
        return symbol_bits(self._spreads, self.constants(constant))

    def _slope(self, constant: float) -> float:
        """Return the bytes that an octave of c takes, by Gaussian entropies."""
        return (self._bits(constant * NUDGE) - self._bits(constant / NUDGE)) / (8 * 2 * math.log2(NUDGE))

    @cached_property
    def _spreads(self) -> dict[str, Spread]:
        return spreads(self.builder.matrices.values())

    def _measure(
        self, model: QuantizedModel, constant: float, aim: float, before: Sequence[Build], states: int
    ) -> tuple[bytes | None, Build]:
        """Predict the bytes while far from the aim; pack from the first prediction on that comes near."""
        if not any(build.packed for build in before):
            predicted = self.predictor.predict_bytes(model)
            if abs(predicted / aim - 1) > NEAR and len(before) < MOST_BUILDS // 2:
                return None, Build(constant, predicted, False, states)
        data = self._packed(model)
        return data, Build(constant, len(data), True, states)

    def _next(self, builds: Sequence[Build], aim: float) -> float:
        """Return the next c: by the secant through the last build and the nearest other of its kind.

        Where there is no other, or their slope makes no sense, by that of Gaussian entropies.
        """
        *others, last = builds
        slope = min(self._slope(last.constant), -self.builder.num_weights / 64)
        alike = [build for build in others if (build.packed, build.states) == (last.packed, last.states)]
        if alike:
            other = min(alike, key=lambda build: abs(build.num_bytes - last.num_bytes))
            octaves = math.log2(last.constant / other.constant)
            if abs(octaves) > 0.002:
                measured = (last.num_bytes - other.num_bytes) / octaves
                slope = measured if 2 * slope < measured < slope / 4 else slope
        step = (aim - last.num_bytes) / slope
        return float(last.constant * 2 ** max(-LARGEST_STEP, min(LARGEST_STEP, step)))


def _symbol_bytes(solution: Solution, name: str) -> float:
    """Return about what a matrix's symbols take."""
    symbols = solution.model.quantized[name].symbols
    return entropy_bits(symbols) * symbols.size / 8
