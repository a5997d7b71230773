"""κ kept beside the checkpoint, under the weights, statistics, text and settings that it was measured with."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pgolf_post.base.ranks import Ranks
from pgolf_post.base.storage import read_json, write_json
from pgolf_post.data import DataFolder
from pgolf_post.derived import derived_id, intact_meta, store
from pgolf_post.fit.build import Builder
from pgolf_post.fit.kappa import Kappa, measure_kappas
from pgolf_post.fit.probe import Probe, probe_text
from pgolf_post.fit.settings import FitSettings

STAGE, STAGE_VERSION, PAYLOAD = "kappa", 1, "kappa.json"


def cached_kappas(
    builder: Builder, data: DataFolder, settings: FitSettings, fresh: bool, ranks: Ranks
) -> tuple[dict[str, Kappa], float]:
    """κ by group, from the cache or measured by all ranks, and the seconds that took where it is from the cache."""
    view, started = builder.view, time.perf_counter()
    text = probe_text(view, data, settings.kappa_tokens, settings.kappa_seed)
    identity = {**settings.model_dump(mode="json", exclude={"distill", "tune_tokens"}), "text_sha256": text.sha256}
    kappa_id = derived_id(STAGE, STAGE_VERSION, [view.id, builder.stats.id], identity)
    folder = view.checkpoint.derived(STAGE, kappa_id)
    meta = ranks.main_says(intact_meta(folder, PAYLOAD) if ranks.is_main and not fresh else None)
    if meta is not None:
        found = {group: Kappa(**facts) for group, facts in read_json(folder / PAYLOAD).items()}
        return found, float(meta["seconds"])
    measured = measure_kappas(builder, Probe(view, text, ranks), settings.kappa)

    def make(building: Path) -> Mapping[str, Any]:
        write_json(building / PAYLOAD, {group: found.facts() for group, found in measured.items()})
        return {"view_id": view.id, "seconds": round(time.perf_counter() - started, 3)}

    config = {"stage": STAGE, "version": STAGE_VERSION, "view": view.name, "view_id": view.id, **identity}
    if ranks.is_main:
        store(folder, PAYLOAD, config, make)
    ranks.wait()
    return measured, 0.0
