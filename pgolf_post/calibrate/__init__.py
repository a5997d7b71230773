"""Calibration: one pass over text → statistics of every matrix's input and, with `fisher`, of the loss's gradients.

settings.py   text, seed and precision               packed.py        triangles on disk, read lazily
text.py       which text, by content                 stats.py         what later stages read
generate.py   text that the model writes itself      partial_sums.py  progress of an interrupted run
forward.py    Σxxᵀ, Σ|x|, max|x| per site            memory.py        memory needed, before work starts
backward.py   Σδ², Σ s·xxᵀ, the embedding's sides    stage.py         the stage: look up, collect, store
products.py   Σxxᵀ, one triangle                     stale.py         statistics of other weights, on purpose
sums.py       additive sums by key                   report.py        the table that a person reads
collect.py    batches, ranks                         randomness.py    numbers by seed and purpose

Modules that need torch are imported on first use, so that commands can show the settings' help at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pgolf_post.base.callable_package import make_callable
from pgolf_post.calibrate.settings import CalibrationSettings

if TYPE_CHECKING:
    from pgolf_post.calibrate.stage import calibrate
    from pgolf_post.calibrate.stale import stale_stats
    from pgolf_post.calibrate.stats import Fisher, Stats
else:
    LATER = {"calibrate": "stage", "stale_stats": "stale", "Fisher": "stats", "Stats": "stats"}  # name: module

    def __getattr__(name: str) -> Any:
        if name not in LATER:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{__name__}.{LATER[name]}"), name)


make_callable(__name__, "stage:calibrate")

__all__ = ["CalibrationSettings", "Fisher", "Stats", "calibrate", "stale_stats"]
