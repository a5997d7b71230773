"""Round prepared tensors to symbols: one function per method of a plan.

A new method is a function here with a line in ROUNDING, and a rule class with a row of rules.METHODS. The function
takes all tensors of its method at once, so that it may round them side by side.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from pgolf_post.errors import SettingsError
from pgolf_post.plan import TensorPlan
from pgolf_post.quantize.clip import max_symbol
from pgolf_post.quantize.gptq.driver import Job, gptq_jobs
from pgolf_post.quantize.gptq.stats_factors import StatsFactors
from pgolf_post.quantize.gptq.trellis import Trellis
from pgolf_post.quantize.rtn import round_to_nearest
from pgolf_post.rules import GptqRule, GridRule


@dataclass(frozen=True)
class Prepared:
    """One tensor, ready to be rounded."""

    entry: TensorPlan
    weight: Tensor  # (rows, columns) float32, stretched and pruned
    unit_steps: Tensor  # (units,) float32, as stored; of the union grid where there is a trellis
    shape: tuple[int, ...]  # of the tensor itself
    seconds: float

    @property
    def rule(self) -> GridRule:
        """The entry's rule."""
        assert isinstance(self.entry.rule, GridRule)
        return self.entry.rule

    @cached_property
    def steps(self) -> Tensor:  # (rows, 1) or (rows, columns)
        """The steps in a shape that broadcasts to the weight."""
        return spread_steps(self.unit_steps, self.weight)

    @property
    def trellis(self) -> Trellis | None:
        """The trellis that the symbols run through; its lanes are no longer than the tensor."""
        return trellis_of(self.entry, len(self.weight))


def trellis_of(entry: TensorPlan, rows: int) -> Trellis | None:
    """Return the trellis of a tensor of so many rows, or None for a scalar grid."""
    rule = entry.rule
    if entry.method != "gptq" or not isinstance(rule, GptqRule) or not rule.trellis_states:
        return None
    return Trellis(rule.trellis_states, min(rule.lane_rows, max(1, rows)))


def spread_steps(steps: Tensor, weight: Tensor) -> Tensor:  # (units,) → (out, 1) or (out, in)
    """Return steps per unit in a shape that broadcasts to the weight (out, in)."""
    rows, columns = weight.shape
    if len(steps) in (1, rows):
        return steps[:, None].expand(rows, 1)
    return steps.repeat_interleave(rows * columns // len(steps)).reshape(rows, columns)


Advance = Callable[[int], object]  # called with the number of weights done
Rounding = Callable[[Sequence[Prepared], StatsFactors, Advance], dict[str, Tensor]]  # name → (rows, columns) symbols


def _rtn(items: Sequence[Prepared], _: StatsFactors, advance: Advance) -> dict[str, Tensor]:
    symbols = {}
    for item in items:
        symbols[item.entry.name] = round_to_nearest(item.weight, item.steps, max_symbol(item.rule.bits))
        advance(item.weight.numel())
    return symbols


def _gptq(items: Sequence[Prepared], factors: StatsFactors, advance: Advance) -> dict[str, Tensor]:
    """Round all problems of equal block size side by side."""
    jobs: dict[int, list[Job]] = defaultdict(list)
    for item in items:
        assert isinstance(item.rule, GptqRule)
        row_factor = factors.get_rows(item.entry) if item.rule.row_feedback else None
        job = Job(
            item.entry.name,
            item.weight,
            factors.get(item.entry),
            item.steps,
            max_symbol(item.rule.bits),
            item.trellis,
            row_factor.feedback if row_factor else None,
        )
        jobs[item.rule.block_size].append(job)
    symbols: dict[str, Tensor] = {}
    for size in sorted(jobs):
        rounded = gptq_jobs(jobs[size], size, advance=advance)
        symbols.update(zip((job.name for job in jobs[size]), rounded, strict=True))
    return symbols


ROUNDING: dict[str, Rounding] = {"rtn": _rtn, "gptq": _gptq}  # keys as in rules.METHODS, those that keep floats apart


def round_prepared(items: Sequence[Prepared], factors: StatsFactors, advance: Advance) -> dict[str, Tensor]:
    """Round every tensor by its entry's method. Raises SettingsError for a method that has no function."""
    by_method: dict[str, list[Prepared]] = defaultdict(list)
    for item in items:
        by_method[item.entry.method].append(item)
    if unknown := sorted(by_method.keys() - ROUNDING.keys()):
        raise SettingsError(f"no such rounding method: {', '.join(unknown)}; valid: {', '.join(ROUNDING)}")
    symbols: dict[str, Tensor] = {}
    for method, same in by_method.items():
        symbols.update(ROUNDING[method](same, factors, advance))
    return symbols
