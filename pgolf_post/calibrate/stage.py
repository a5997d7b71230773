"""`calibrate`: the statistics of a view, from the cache, or else collected and stored.

The key is the view (weights and config, runtime graph state included), the text by content, the settings and the stage
version, so statistics of other weights are never used by accident; stale.py is for using them on purpose.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pgolf_post.base.autocast import autocast_dtype, autocast_to
from pgolf_post.base.ranks import ALONE, Ranks
from pgolf_post.base.storage import PARTIAL_SUFFIX, read_json
from pgolf_post.calibrate.collect import Observed, collect
from pgolf_post.calibrate.generate import own_text
from pgolf_post.calibrate.memory import plan_memory, require_memory
from pgolf_post.calibrate.settings import CalibrationSettings
from pgolf_post.calibrate.stats import PAYLOAD, Stats, open_stats, write_stats
from pgolf_post.calibrate.sums import FISHER_KINDS
from pgolf_post.calibrate.text import CalibrationSet, draw_training_text, random_text
from pgolf_post.checkpoint import View
from pgolf_post.data import DataFolder
from pgolf_post.derived import Stage, require_writable_result
from pgolf_post.families import load_module

STATS = Stage("stats", 2, PAYLOAD)


def calibrate(
    view: View, data: DataFolder, settings: CalibrationSettings, fresh: bool = False, ranks: Ranks = ALONE
) -> Stats:
    """Return the view's statistics. Cached ones with the backward half are also used where it was not asked for.

        >>> pg.calibrate(view, data, pg.CalibrationSettings(tokens=65536)).num_tokens

    Raises PgolfError if memory does not suffice, MismatchError if the training text is too short or is validation text,
    NumericsError for sums that are not finite.
    """
    seq_len = settings.seq_len or view.train_seq_len
    text = calibration_text(view, data, settings, seq_len, ranks)
    if not fresh:
        for wanted in dict.fromkeys([settings, settings.model_copy(update={"fisher": True})]):
            stats_id = stats_id_of(view, wanted, text, seq_len)
            folder = view.checkpoint.derived(STATS.name, stats_id)
            meta = ranks.main_says(STATS.intact_meta(folder) if ranks.is_main else None)
            if meta is not None:
                return open_stats(folder, stats_id, meta, cached=True)
    return _collect(view, settings, text, seq_len, ranks, fresh)


def calibration_text(
    view: View, data: DataFolder, settings: CalibrationSettings, seq_len: int, ranks: Ranks = ALONE
) -> CalibrationSet:
    """Return the calibration set that the settings name for a view."""
    if settings.source == "train":
        return draw_training_text(data, settings, seq_len)
    if settings.source == "random":
        return random_text(data.vocab_size, settings, seq_len)
    return CalibrationSet((), own_text(view, settings, seq_len, ranks))


def stats_id_of(view: View, settings: CalibrationSettings, text: CalibrationSet, seq_len: int) -> str:
    """Return the id of a view's statistics on a text."""
    return STATS.id([view.id], _identity(settings, text, seq_len))


def _identity(settings: CalibrationSettings, text: CalibrationSet, seq_len: int) -> dict[str, Any]:
    """Return what decides statistics besides the view. Other sums of the backward half make other statistics."""
    sums = {"backward": list(FISHER_KINDS)} if settings.fisher else {}
    return {**settings.model_dump(mode="json"), "seq_len": seq_len, "calibration_sha256": text.sha256, **sums}


def observe(view: View, settings: CalibrationSettings, ranks: Ranks = ALONE) -> Observed:
    """Return the view's model on this rank's device, with the sites and lookups that its family names."""
    module = load_module(view.config, view.tensors, str(view)).to(ranks.device)
    family = view.family
    autocast = autocast_dtype(settings.precision, ranks.device)
    lookups = family.lookups(module) if settings.fisher else []
    return Observed(module, family.sites(module), lookups, settings.fisher, settings.seed, autocast)


def _collect(
    view: View, settings: CalibrationSettings, text: CalibrationSet, seq_len: int, ranks: Ranks, fresh: bool
) -> Stats:
    """Collect on all ranks, write on the first, and open what was written."""
    started = time.perf_counter()
    stats_id = stats_id_of(view, settings, text, seq_len)
    folder = view.checkpoint.derived(STATS.name, stats_id)
    partial = folder.with_name(folder.name + PARTIAL_SUFFIX)
    if fresh and ranks.is_main:
        shutil.rmtree(partial, ignore_errors=True)
    # refuse before any work if the result could not be written or memory does not suffice
    if ranks.is_main:
        require_writable_result(folder)
    observed = observe(view, settings, ranks)
    batch_tokens = observed.batch_windows(seq_len) * seq_len
    with autocast_to(observed.device, observed.autocast):
        plan = plan_memory(observed.module, observed.sites, observed.lookups, batch_tokens, seq_len, settings.fisher)
    require_memory(plan, observed.device, ranks.world_size)
    # collect on every rank
    ranks.wait()
    sums = collect(observed, text.tokens, ranks, partial)
    config: dict[str, Any] = {"view": view.name, "view_id": view.id}
    config |= {**_identity(settings, text, seq_len), "spans": [list(span) for span in text.spans]}

    def make(building: Path) -> Mapping[str, Any]:
        write_stats(building, sums)
        return {"seconds": round(time.perf_counter() - started, 3), **_facts(stats_id, view, observed, text, ranks)}

    # write on the first rank, read on all
    if ranks.is_main:
        STATS.store(folder, config, make)
        shutil.rmtree(partial, ignore_errors=True)
    ranks.wait()
    return open_stats(folder, stats_id, read_json(folder / "meta.json"), cached=False)


def _facts(stats_id: str, view: View, observed: Observed, text: CalibrationSet, ranks: Ranks) -> dict[str, Any]:
    """Return what meta.json says of statistics, besides the seconds they took."""
    facts: dict[str, Any] = {"stats_id": stats_id, "view_id": view.id, "num_tokens": int(text.tokens.size)}
    facts["processes"] = ranks.world_size
    facts["device"] = observed.device.type
    facts["computed_in"] = str(observed.autocast or "torch.float32").removeprefix("torch.")
    facts["sites"] = [site.name for site in observed.sites]
    if observed.fisher:
        head = next(site.tensors[0] for site in observed.sites if site.is_head)
        facts["fisher"] = {"head": head, "token_table": observed.lookups[0].tensor}
    return facts
