"""The cache of κ: beside the checkpoint, under the weights, statistics, text and settings that it was measured with."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pgolf_post.base.ranks import Ranks
from pgolf_post.base.storage import read_json, write_json
from pgolf_post.data import DataFolder
from pgolf_post.derived import Stage, require_writable_result
from pgolf_post.errors import SettingsError
from pgolf_post.fit.build import Builder
from pgolf_post.fit.idle import require_idle
from pgolf_post.fit.kappa import Kappa, measure_kappas
from pgolf_post.fit.probe import Probe, probe_text
from pgolf_post.fit.settings import TUNING_FIELDS, FitSettings

STAGES = {"tensor": Stage("kappa", 1, "kappa.json"), "role": Stage("kappa", 2, "kappa.json")}


def cached_kappas(
    builder: Builder, data: DataFolder, settings: FitSettings, fresh: bool, ranks: Ranks, compiled: bool = False
) -> tuple[dict[str, Kappa], float]:
    """Return κ by group, and the seconds that measuring took if it was done before: 0 where all ranks measure now.

    Raises SettingsError if the text is a single window, NumericsError as `require_idle` does.
    """
    view, started = builder.view, time.perf_counter()
    text = probe_text(view, data, settings.kappa_tokens, settings.kappa_seed)
    identity = settings.identity(TUNING_FIELDS | {"regularize"})
    identity |= {"text_sha256": text.sha256, **builder.identity}
    stage = STAGES[settings.kappa]
    folder = view.checkpoint.derived(stage.name, stage.id([view.id, builder.stats.id], identity))
    meta = ranks.main_says(stage.intact_meta(folder) if ranks.is_main and not fresh else None)
    if meta is not None:
        kappas = {group: Kappa(**facts) for group, facts in read_json(folder / stage.payload).items()}
        return kappas, float(meta["seconds"])
    if len(text.tokens) < 2:
        raise SettingsError(
            f"kappa_tokens = {settings.kappa_tokens} is one window of {view.train_seq_len} tokens; κ's error needs two",
            hint=f"--kappa-tokens {2 * view.train_seq_len} or more, or --kappa off",
        )
    if ranks.is_main:
        require_writable_result(folder)
    probe = Probe(view, text, ranks, "inductor" if compiled else None)
    require_idle(probe, builder.zeros)
    measured = measure_kappas(builder, probe, settings.kappa)

    def make(building: Path) -> Mapping[str, Any]:
        write_json(building / stage.payload, {group: one.facts() for group, one in measured.items()})
        return {"view_id": view.id, "seconds": round(time.perf_counter() - started, 3)}

    config = {"view": view.name, "view_id": view.id, **identity}
    if ranks.is_main:
        stage.store(folder, config, make)
    ranks.wait()
    return measured, 0.0
