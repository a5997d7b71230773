"""Regularisation by rate: where steps are coarse, measure how far the factors of C and M may be trusted.

Feedback moves weights, and a weight that is moved costs bits, too: bits + loss is least at H' = κrH + ηc²/(12σ²)·I, not
at H. At three bits a weight and more the second term is nothing. Below, targets that follow every correlation spread so
far that they cost more than they save. σ is not one number, so no formula is trusted: a few pairs of a factor on C's
entries off the diagonal and a ridge on both sides are tried at the budget. Each gets factors and a c of its own,
because steps follow the factors and other bytes would decide the comparison. Few states suffice to rank them. What
counts is the divergence on the text on which κ is measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pgolf_post.base.progress import say
from pgolf_post.calibrate import Stats
from pgolf_post.checkpoint import View
from pgolf_post.fit.build import Builder
from pgolf_post.fit.limits import fixed_bytes
from pgolf_post.fit.prepare import Fitter, probe_seconds
from pgolf_post.fit.probe import Probe, decoded, probe_text
from pgolf_post.fit.settings import FitSettings
from pgolf_post.fit.solve import Rough, Search

PAIRS = ((1.0, 0.003), (0.8, 0.01), (0.6, 0.01), (0.6, 0.03))  # coupling, ridge
MOST_BITS = 3.0  # a weight: above, they lose the same
STEP_NAME = "regularisation"  # on the training clock


@dataclass(frozen=True)
class Trial:
    """One pair at a budget."""

    coupling: float
    ridge: float
    divergence: float  # nats per token, at the bytes that were aimed for
    constant: float  # c

    def facts(self) -> dict[str, float]:
        return {"coupling": self.coupling, "ridge": self.ridge, "divergence": self.divergence}


def regularized(fitter: Fitter, limit: int, codec: str) -> tuple[Fitter, float | None, dict[str, Any]]:
    """Return the fitter whose factors lose least at a budget, the c it was found at, and what meta.json says of it.

    That is the one given, unless the settings say `regularize = "rate"` and name no pair themselves, the budget is
    below 3 bits a weight, κ was measured, and there is time to read its text once for each pair.
    """
    settings = fitter.settings
    chosen = settings.regularize == "fixed" or (settings.coupling, settings.ridge) != PAIRS[0]
    if chosen or not fitter.kappas or bits_of(fitter.builder, limit) > MOST_BITS:
        return fitter, None, {}
    if not fitter.clock.allows(STEP_NAME, probe_seconds(fitter.stats, settings.kappa_tokens, len(PAIRS))):
        return fitter, None, {}
    with fitter.clock.step(STEP_NAME):
        text = probe_text(fitter.view, fitter.data, settings.kappa_tokens, settings.kappa_seed)
        probe, kappa = Probe(fitter.view, text), fitter.kappa
        choices = pairs_of(settings)
        builder, constant, trials = least_divergent(fitter.view, fitter.stats, choices, kappa, probe, limit, codec)
    best = min(trials, key=lambda trial: trial.divergence)
    facts = {**best.facts(), "tried": [trial.facts() for trial in trials]}
    return replace(fitter, builder=builder), constant, {"regularized": facts}


def pairs_of(settings: FitSettings) -> list[FitSettings]:
    """Return settings with each of the pairs that are tried."""
    return [settings.model_copy(update={"coupling": coupling, "ridge": ridge}) for coupling, ridge in PAIRS]


def least_divergent(
    view: View,
    stats: Stats,
    choices: Sequence[FitSettings],
    kappa: Mapping[str, float],
    probe: Probe,
    limit: int,  # bytes
    codec: str,
) -> tuple[Builder, float, list[Trial]]:
    """Return the builder whose factors lose least at a budget, the c it was found at, and all trials."""
    trials: list[Trial] = []
    best: Builder | None = None
    least, constant = math.inf, 0.0
    for settings in choices:
        builder = Builder(view, stats, settings)
        rough = Search(builder, kappa, codec).rough(limit, trials[-1].constant if trials else None)
        divergence = probe.divergence(decoded(rough.model.quantized)).mean * 4 ** spare_bits(builder, rough)
        trials.append(Trial(settings.coupling, settings.ridge, divergence, rough.constant))
        say(
            f"C × {settings.coupling:g} off its diagonal, ridge {settings.ridge:g}: divergence {divergence:.6f} on "
            "training text"
        )
        if best is None or divergence < least:
            best, least, constant = builder, divergence, rough.constant
    assert best is not None
    return best, constant, trials


def bits_of(builder: Builder, limit: int) -> float:
    """Return the bits that a budget leaves for each weight; infinite where nothing is rounded."""
    return 8 * (limit - fixed_bytes(builder)) / builder.num_weights if builder.num_weights else float("inf")


def spare_bits(builder: Builder, rough: Rough) -> float:
    """Return by how many bits a weight a build exceeds its aim: each of them quarters what is lost."""
    return 8 * (rough.num_bytes - rough.aim) / builder.num_weights
