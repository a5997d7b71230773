"""Statistics of other weights, on purpose: `--allow-stale`, with a probe of how far off they are.

Using one checkpoint's Hessians on another saves time and can lose quality unnoticed. It never happens by accident
(every key starts from the weights), and on purpose it is recorded in everything made from them. The probe runs a small
sample of text through these weights and compares the mean Hessians of each site: the ratio of their traces, and the
relative Frobenius distance ‖H_probe - H_stale‖ / ‖H_probe‖. Its own sampling noise is estimated from the distance
between its two halves; a distance near that noise means that no difference was seen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from pgolf_post.base.progress import say
from pgolf_post.calibrate.collect import collect
from pgolf_post.calibrate.packed import mirror_upper
from pgolf_post.calibrate.settings import CalibrationSettings
from pgolf_post.calibrate.stage import STATS, calibration_text, observe
from pgolf_post.calibrate.stats import PAYLOAD, Stats, open_stats
from pgolf_post.checkpoint import View
from pgolf_post.data import DataFolder
from pgolf_post.derived import verified_meta
from pgolf_post.errors import MismatchError, NotFoundError

PROBE_TOKENS = 8192


def stale_stats(view: View, data: DataFolder, hessians: str, settings: CalibrationSettings) -> Stats:
    """Return statistics for this view by path, or by id (or its first digits) in the view's run and its neighbours.

    Raises NotFoundError, DamagedFileError, or MismatchError if one of the view's sites is missing or has another width.
    """
    folder = find_stats(view, hessians)
    meta = verified_meta(folder, PAYLOAD)
    stats = open_stats(folder, str(meta["stats_id"]), meta, cached=True)
    _require_sites(view, stats, folder)
    if settings.fisher and stats.fisher is None:
        raise MismatchError(
            f"{folder} has no backward half, which --fisher asks for", hint="leave --fisher out, or calibrate --fisher"
        )
    if stats.view_id == view.id:
        return stats
    distances = probe(view, data, stats, settings)
    say(f"STALE statistics {stats.id[:12]}, of weights {str(stats.view_id)[:12]}: {summary(distances)}")
    return dataclasses.replace(stats, stale={"stats": str(folder), "view_id": stats.view_id, "probe": distances})


def find_stats(view: View, hessians: str) -> Path:
    """Return the folder that a path or an id names. Raises NotFoundError, or MismatchError if an id is not unique."""
    path = Path(hessians)
    if (path / "meta.json").is_file():
        return path
    if path.exists():
        raise NotFoundError(f"{path} is not a folder of statistics: it has no meta.json", hint="pgolf-post cache list")
    root = view.checkpoint.path.resolve().parent.parent
    matches = [folder for folder in root.glob(f"*/*/derived/{STATS.name}/*") if _names(folder, hessians)]
    if not matches:
        raise NotFoundError(f"no statistics {hessians!r} under {root}", hint="pgolf-post cache list --stage stats")
    if len(matches) > 1:
        listed = ", ".join(str(match) for match in matches)
        raise MismatchError(f"{hessians!r} names {len(matches)} folders: {listed}", hint="pass one of these paths")
    return matches[0]


def _names(folder: Path, hessians: str) -> bool:
    """Return whether an id, or its first digits, names a complete folder (named by the id's first twelve digits)."""
    enough = bool(hessians) and (folder / "meta.json").is_file()
    return enough and (folder.name.startswith(hessians) or hessians.startswith(folder.name))


def _require_sites(view: View, stats: Stats, folder: Path) -> None:
    """Raise MismatchError listing the view's sites that the statistics lack or have with another width."""
    problems = []
    for site in observe(view, CalibrationSettings()).sites:
        width = int(view.tensors[site.tensors[0]].shape[1])
        if site.name not in stats.abs_sums:
            problems.append(f"{site.name} is missing")
        elif len(stats.abs_sums[site.name]) != width:
            problems.append(f"{site.name} has width {len(stats.abs_sums[site.name])}, not {width}")
    if problems:
        raise MismatchError(f"{folder} does not fit {view}: {', '.join(problems)}", hint="pgolf-post calibrate")


def probe(view: View, data: DataFolder, stats: Stats, settings: CalibrationSettings) -> dict[str, dict[str, float]]:
    """Return site → trace_ratio (stale over probe), distance, and the probe's own noise."""
    few = settings.model_copy(update={"tokens": min(settings.tokens, PROBE_TOKENS), "fisher": False})
    text = calibration_text(view, data, few, settings.seq_len or view.train_seq_len).tokens
    observed = observe(view, few)
    halves = [collect(observed, half) for half in (text[::2], text[1::2]) if len(half)]
    counts = [float(half["tokens.all"]) for half in halves]
    compared = {}
    for site in observed.sites:
        matrices = [mirror_upper(half[f"hessian.{site.name}"]).cpu() for half in halves]
        compared[site.name] = compare(stats.mean_hessian(site.name), matrices, counts)
    return compared


def compare(
    stale: Tensor,  # (n, n), per token
    halves: list[Tensor],  # one or two sums (n, n) of the probe
    counts: list[float],  # their tokens
) -> dict[str, float]:
    """Return the trace ratio and distance of a mean Hessian to a probe's, and the noise of a probe of two halves."""
    fresh = torch.stack(halves).sum(0) / sum(counts)
    norm = max(float(torch.linalg.matrix_norm(fresh)), 1e-300)
    result = {
        "trace_ratio": float(stale.trace()) / max(float(fresh.trace()), 1e-300),
        "distance": float(torch.linalg.matrix_norm(fresh - stale)) / norm,
    }
    if len(halves) == 2:
        difference = halves[0] / counts[0] - halves[1] / counts[1]
        result["noise"] = float(torch.linalg.matrix_norm(difference)) / 2 / norm
    return result


def summary(sites: dict[str, dict[str, float]]) -> str:
    """Return a probe's result in one line: the worst site, and the median over sites."""
    worst = max(sites, key=lambda site: sites[site]["distance"])
    ratios, distances = ([site[key] for site in sites.values()] for key in ("trace_ratio", "distance"))
    noise = [site["noise"] for site in sites.values() if "noise" in site]
    text = f"Hessians differ by {_median(distances):.1%} (median of {len(sites)} sites; "
    text += f"at most {sites[worst]['distance']:.1%}, at {worst}), traces by a factor of {min(ratios):.3f} to "
    text += f"{max(ratios):.3f}"
    return text + (f"; sampling noise of the probe about {_median(noise):.1%}" if noise else "")


def _median(values: Iterable[float]) -> float:
    return float(torch.tensor(list(values)).median())
