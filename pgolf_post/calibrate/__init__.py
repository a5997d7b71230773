"""Calibration: one pass over text → what every matrix's input looks like and, with `fisher`, what the loss minds.

settings.py   what a calibration is made of          packed.py    triangles on disk, read lazily
text.py       which text, by content                 stats.py     what later stages read
generate.py   text that the model writes itself      partial.py   interrupted work goes on
forward.py    Σxxᵀ, Σ|x|, max|x| per site            memory.py    is there room, before work starts
backward.py   Σδ², Σ s·xxᵀ, the embedding's sides    run.py       the stage: cache, collect, keep
products.py   Σxxᵀ, one triangle                     stale.py     statistics of other weights, on purpose
sums.py       additive sums by key                   collect.py   batches, ranks

What needs torch is imported when it is first asked for, so that commands can show the settings' help at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

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


__all__ = ["CalibrationSettings", "Fisher", "Stats", "calibrate", "stale_stats"]
