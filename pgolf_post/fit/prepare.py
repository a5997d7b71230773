"""Preparation of a fit: everything that all byte budgets of one checkpoint share.

Statistics and κ are read from the cache or made; the text for fine-tuning is drawn. All of it reads training data, so
every step is timed (training_clock.py), and optional ones are skipped where seconds are limited.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pgolf_post.base.ranks import ALONE, Ranks
from pgolf_post.calibrate import CalibrationSettings, Stats, calibrate
from pgolf_post.calibrate.stage import calibration_text
from pgolf_post.calibrate.text import CalibrationSet, training_tokens
from pgolf_post.checkpoint import View
from pgolf_post.data import DataFolder
from pgolf_post.fit.build import Builder
from pgolf_post.fit.kappa import Kappa, by_tensor
from pgolf_post.fit.kappa_cache import cached_kappas
from pgolf_post.fit.replay import STEP_NAME
from pgolf_post.fit.settings import TUNING_FIELDS, FitSettings
from pgolf_post.fit.training_clock import TrainingClock
from pgolf_post.fit.tune import split_text
from pgolf_post.plan import DistillSettings

DISTILL = DistillSettings()


@dataclass(frozen=True)
class Fitter:
    """Everything that all budgets of one checkpoint share."""

    view: View
    data: DataFolder
    stats: Stats
    settings: FitSettings
    builder: Builder
    kappas: Mapping[str, Kappa]  # tensor or role → measurement; empty where κ is off
    clock: TrainingClock  # of the steps that read training text, now or when their cached result was made
    distills: bool  # whether floats are tuned: asked for, and there is time
    texts: tuple[CalibrationSet, CalibrationSet] | None = None  # to fine-tune on, and held out; None: no fine-tuning
    ranks: Ranks = ALONE  # that fine-tune together (tune_ranks.py)

    @property
    def kappa(self) -> dict[str, float]:
        """Tensor → κ."""
        return by_tensor(self.builder, self.kappas, self.settings.kappa)

    @property
    def identity(self) -> dict[str, Any]:
        """Settings and measurements that decide the symbols, beside view, statistics and bytes."""
        settings = self.settings.identity(TUNING_FIELDS)
        choices = {
            "precision": (self.settings.tune_precision, "fp32"),
            "optimizer": (self.settings.tune_optimizer, "adam"),
        }
        chosen: dict[str, Any] = {name: value for name, (value, before) in choices.items() if value != before}
        if self.settings.tune_optimizer != "adam":
            chosen["version"] = 2  # floats are tuned, and held-out text says how far a stage goes
        tuning = (
            {"tokens": self.settings.tune_tokens, "text_sha256": [text.sha256 for text in self.texts], **chosen}
            if self.texts
            else {}
        )
        extra = {"distill": DISTILL.model_dump() if self.distills else {}, "tune": tuning, **self.builder.identity}
        return {"fit": settings, "kappa": self.kappa, **{name: value for name, value in extra.items() if value}}


def prepare(
    view: View,
    data: DataFolder,
    calibration: CalibrationSettings,
    settings: FitSettings,
    clock: TrainingClock | None = None,
    fresh: bool = False,
    ranks: Ranks = ALONE,
    stats: Stats | None = None,  # instead of collecting them; their seconds are the caller's to count
    compiled: bool = False,  # whether κ's forward passes are
) -> Fitter:
    """Collect statistics, measure κ, and do everything else that does not depend on the budget. Runs on all ranks.

    What there is time for is decided by rank 0's clock: κ and fine-tuning are shared work, which no rank may leave out.
    Raises SettingsError if the seconds allowed do not even hold the statistics or the text is too short to tune on, and
    what `calibrate` raises.
    """
    clock = clock or TrainingClock()
    if stats is None:
        with clock.step("statistics") as step:
            stats = calibrate(view, data, calibration.model_copy(update={"fisher": True}), fresh, ranks)
            step.add(stats.seconds if stats.cached else 0.0)
    builder = Builder(view, stats, settings)
    kappas: Mapping[str, Kappa] = {}
    seconds = probe_seconds(stats, settings.kappa_tokens, len(builder.matrices))
    if settings.kappa != "off" and ranks.main_says(clock.allows("kappa", seconds)):
        with clock.step("kappa") as step:
            kappas, cached_seconds = cached_kappas(builder, data, settings, fresh, ranks, compiled)
            step.add(cached_seconds)
    distills = settings.distill and clock.allows("distillation", _distill_seconds(stats))
    texts = _tune_texts(view, data, stats, calibration, settings, clock, ranks)
    return Fitter(view, data, stats, settings, builder, kappas, clock, distills, texts, ranks)


def _tune_texts(
    view: View,
    data: DataFolder,
    stats: Stats,
    calibration: CalibrationSettings,
    settings: FitSettings,
    clock: TrainingClock,
    ranks: Ranks,
) -> tuple[CalibrationSet, CalibrationSet] | None:
    """Return the text to fine-tune on and the text held out; None if nothing is to be tuned, or not in time.

    Training text is read once where the split has enough of it, and never less than is calibrated on. Text that the
    model writes is no training data, so no clock limits it.
    """
    if not settings.tune_tokens:
        return None
    seq_len = calibration.seq_len or view.train_seq_len
    if settings.tune_source == "self":
        own = calibration.model_copy(update={"tokens": settings.tune_tokens, "source": "self"})
        return split_text(calibration_text(view, data, own, seq_len, ranks))
    if not ranks.main_says(clock.allows(STEP_NAME, tune_seconds(stats, settings.tune_tokens))):
        return None
    if calibration.source == "train":
        tokens = min(max(calibration.tokens, settings.tune_tokens), training_tokens(data, seq_len))
        calibration = calibration.model_copy(update={"tokens": tokens})
    return split_text(calibration_text(view, data, calibration, seq_len, ranks))


def probe_seconds(stats: Stats, tokens: int, models: int) -> float:
    """Return about what the divergences of some models take at most: statistics cost three forward passes a token."""
    return stats.seconds / stats.num_tokens / 3 * tokens * (models + 1)


def tune_seconds(stats: Stats, tokens: int) -> float:
    """Return about what fine-tuning will take: two forward passes and a backward one, about as statistics do."""
    return stats.seconds / stats.num_tokens * tokens


def _distill_seconds(stats: Stats) -> float:
    """Return about what distillation will take: a forward and a backward pass a step, beside the reference's head."""
    return stats.seconds / stats.num_tokens * (DISTILL.steps * DISTILL.batch_tokens + DISTILL.tokens)
