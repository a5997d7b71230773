"""Factorised Hessians of one set of statistics, shared by the matrices of a site and by the trials of a sweep."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from torch import Tensor

from pgolf_post.calibrate import Stats
from pgolf_post.plan import GptqRule, GridRule, TensorPlan
from pgolf_post.quantize.awq import column_scales, stretched_hessian
from pgolf_post.quantize.gptq.factorize import FactorCache, LDLFactor


def row_hessian(row: TensorPlan, stats: Stats) -> Tensor | None:  # (in, in) float64, fresh
    """The mean Hessian of a row's inputs, as AWQ leaves them; None for a matrix that no site feeds."""
    if row.site is None:
        return None
    return _site_hessian(stats, row.site, row.rule.awq_alpha if isinstance(row.rule, GridRule) else 0.0)


def _site_hessian(stats: Stats, site: str, alpha: float) -> Tensor:
    hessian = stats.mean_hessian(site)
    return stretched_hessian(hessian, column_scales(stats.mean_abs(site), alpha)) if alpha else hessian


class StatsFactors:
    """What GPTQ rows are rounded against, each factorized once per (site, AWQ α, damping, order)."""

    def __init__(self, stats: Stats) -> None:
        self.stats = stats
        self._sites: dict[str, tuple[str, float]] = {}  # label → (site, α)
        self._cache = FactorCache(lambda label: _site_hessian(stats, *self._sites[label]))

    def fill(self, rows: Iterable[TensorPlan]) -> None:
        """Factorize, side by side, what these rows need. Raises NumericsError naming a site that cannot be."""
        labels: dict[tuple[float, bool], list[str]] = defaultdict(list)
        for row in rows:
            label, damp, act_order = self._key(row)
            labels[damp, act_order].append(label)
        for (damp, act_order), wanted in labels.items():
            self._cache.fill(wanted, damp, act_order)

    def get(self, row: TensorPlan) -> LDLFactor:
        """The factor of a GPTQ row."""
        return self._cache.get(*self._key(row))

    def _key(self, row: TensorPlan) -> tuple[str, float, bool]:
        rule, site = row.rule, row.site
        assert isinstance(rule, GptqRule)
        assert site is not None
        label = f"{site} (AWQ {rule.awq_alpha:g})" if rule.awq_alpha else site
        self._sites[label] = site, rule.awq_alpha
        return label, rule.damp, rule.act_order
