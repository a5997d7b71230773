"""Statistics of other weights, on purpose: `--allow-stale`, with a probe of how far off they are.

Hessians of one checkpoint used on another are a common way to save time and a common way to lose quality unnoticed. So
it is never done by accident (every key starts from the weights), and done on purpose it leaves a trace in whatever is
made from it. The probe runs a small sample of text through these weights and compares, site by site, per token: the
ratio of traces and the relative Frobenius distance ‖H_probe - H_stale‖ / ‖H_probe‖, beside the distance that halves of
the probe itself suggest for its own sampling noise. A distance near that noise says: no difference was seen.
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
    """Statistics at a path, or of an id (or its first digits) in the view's run and its neighbours, for this view.

    Raises NotFoundError, DamagedFileError, or MismatchError if they lack one of the view's sites or its width.
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
    found = probe(view, data, stats, settings)
    say(f"STALE statistics {stats.id[:12]}, of weights {str(stats.view_id)[:12]}: {summary(found)}")
    return dataclasses.replace(stats, stale={"stats": str(folder), "view_id": stats.view_id, "probe": found})


def find_stats(view: View, hessians: str) -> Path:
    """The folder that a path or an id names. Raises NotFoundError, or MismatchError if an id is not unique."""
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
    """Whether an id, or its first digits, names a complete folder (which is named by the id's first twelve)."""
    enough = bool(hessians) and (folder / "meta.json").is_file()
    return enough and (folder.name.startswith(hessians) or hessians.startswith(folder.name))


def _require_sites(view: View, stats: Stats, folder: Path) -> None:
    """Raise MismatchError listing the view's sites that the statistics lack or know by another width."""
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
    """Per site: trace_ratio (stale over probe), distance, and the probe's own noise."""
    few = settings.model_copy(update={"tokens": min(settings.tokens, PROBE_TOKENS), "fisher": False})
    text = calibration_text(view, data, few, settings.seq_len or view.train_seq_len).tokens
    observed = observe(view, few)
    halves = [collect(observed, half) for half in (text[::2], text[1::2]) if len(half)]
    counts = [float(half["tokens.all"]) for half in halves]
    found = {}
    for site in observed.sites:
        matrices = [mirror_upper(half[f"hessian.{site.name}"]).cpu() for half in halves]
        found[site.name] = compare(stats.mean_hessian(site.name), matrices, counts)
    return found


def compare(
    stale: Tensor,  # (n, n), per token
    halves: list[Tensor],  # one or two sums (n, n) of the probe
    counts: list[float],  # their tokens
) -> dict[str, float]:
    """How far a mean Hessian is from that of a probe, and how far the probe may be from its own mean."""
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


def summary(found: dict[str, dict[str, float]]) -> str:
    """One line: the worst site, and the median over sites."""
    worst = max(found, key=lambda site: found[site]["distance"])
    ratios, distances = ([row[key] for row in found.values()] for key in ("trace_ratio", "distance"))
    noise = [row["noise"] for row in found.values() if "noise" in row]
    text = f"Hessians differ by {_median(distances):.1%} (median of {len(found)} sites; "
    text += f"at most {found[worst]['distance']:.1%}, at {worst}), traces by a factor of {min(ratios):.3f} to "
    text += f"{max(ratios):.3f}"
    return text + (f"; sampling noise of the probe about {_median(noise):.1%}" if noise else "")


def _median(values: Iterable[float]) -> float:
    return float(torch.tensor(list(values)).median())
