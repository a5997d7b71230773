"""Factorized Hessians of one set of statistics, shared by the matrices of a site and by the trials of a sweep."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from torch import Tensor

from pgolf_post.calibrate import Stats
from pgolf_post.errors import MismatchError
from pgolf_post.plan import TensorPlan
from pgolf_post.quantize.awq import column_scales, stretched_hessian
from pgolf_post.quantize.gptq.factorize import FactorCache, LDLFactor
from pgolf_post.rules import GptqRule, GridRule


def entry_hessian(entry: TensorPlan, stats: Stats) -> Tensor | None:  # (in, in) float64, fresh
    """Return the mean Hessian of an entry's inputs, as AWQ leaves them; None for a matrix that no site feeds."""
    if entry.site is None:
        return None
    return _site_hessian(stats, entry.site, entry.rule.awq_alpha if isinstance(entry.rule, GridRule) else 0.0)


def _site_hessian(stats: Stats, site: str, alpha: float) -> Tensor:
    hessian = stats.mean_hessian(site)
    return stretched_hessian(hessian, column_scales(stats.mean_abs(site), alpha)) if alpha else hessian


class StatsFactors:
    """LDL factors of a set of statistics, each computed once per (site, AWQ α, damping, order).

    Entries with row feedback have a second factor, of their output gradients' second moment, per (tensor, damping).
    """

    def __init__(self, stats: Stats) -> None:
        self.stats = stats
        self._sites: dict[str, tuple[str, float]] = {}  # label → (site, α)
        self._cache = FactorCache(lambda label: _site_hessian(stats, *self._sites[label]))
        self._row_cache = FactorCache(self._outputs)

    def fill(self, entries: Iterable[TensorPlan]) -> None:
        """Factorize, side by side, what these GPTQ entries need.

        Raises NumericsError naming a site that cannot be factorized, MismatchError where an entry asks for row feedback
        and the statistics hold no second moment of its output gradients.
        """
        labels: dict[tuple[float, bool], list[str]] = defaultdict(list)
        tensors: dict[float, list[str]] = defaultdict(list)
        for entry in entries:
            label, damp, act_order = self._key(entry)
            labels[damp, act_order].append(label)
            if isinstance(entry.rule, GptqRule) and entry.rule.row_feedback:
                self._require_outputs(entry)
                tensors[damp].append(entry.name)
        for (damp, act_order), wanted in labels.items():
            self._cache.fill(wanted, damp, act_order)
        for damp, names in tensors.items():
            self._row_cache.fill(names, damp, act_order=False)

    def get(self, entry: TensorPlan) -> LDLFactor:
        """Return the factor of a GPTQ entry's Hessian."""
        return self._cache.get(*self._key(entry))

    def get_rows(self, entry: TensorPlan) -> LDLFactor:
        """Return the factor of an entry's output gradients' second moment. Raises MismatchError as `fill` does."""
        self._require_outputs(entry)
        return self._row_cache.get(entry.name, self._key(entry)[1], act_order=False)

    def _outputs(self, tensor: str) -> Tensor:  # (out, out) float64
        assert self.stats.fisher is not None
        return self.stats.fisher.mean_outputs(tensor)

    def _require_outputs(self, entry: TensorPlan) -> None:
        fisher = self.stats.fisher
        if fisher is None:
            raise MismatchError(
                f"rule {entry.rule.name!r} has row_feedback, and statistics {self.stats.id[:12]} have no backward half",
                hint=f"pgolf-post calibrate --fisher, or --set {entry.rule.name}.row_feedback=false",
            )
        if entry.name not in fisher.outputs:
            raise MismatchError(
                f"rule {entry.rule.name!r}: row_feedback cannot act on {entry.name}: statistics {self.stats.id[:12]} "
                "hold no second moment of its output gradients",
                hint="give the tensor a rule without row_feedback",
            )

    def _key(self, entry: TensorPlan) -> tuple[str, float, bool]:
        rule, site = entry.rule, entry.site
        assert isinstance(rule, GptqRule)
        assert site is not None
        label = f"{site} (AWQ {rule.awq_alpha:g})" if rule.awq_alpha else site
        self._sites[label] = site, rule.awq_alpha
        return label, rule.damp, rule.act_order
