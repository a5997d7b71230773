"""Post-hoc EMA: any length of moving average, ending at any step of a run, after the run (arXiv 2312.02696, section 3).

The trainer's snapshots of power-function averages (`snapshots.py`) are combined with the shares that bring their
profiles nearest to the wanted one (`profiles.py`). The reconstruction error, ‖wanted - combined‖ / ‖wanted‖ over the
profiles, is recorded; above `max_error` the average is refused, because it would not have the length that it is named
by. An average ends sharply, so the error is small only where snapshots end: at the evenly spaced ones and at every
phase boundary's checkpoint. Snapshots are read one tensor at a time, in the memory of one model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pgolf_post.average.profiles import Combination, ExponentialLength, Length, PowerLength, combine
from pgolf_post.average.settings import MAX_ERROR, HalfLifeSettings, PowerSettings
from pgolf_post.average.snapshots import FOLDER, Snapshot, list_snapshots, stream_tensors
from pgolf_post.base.progress import progress_bar, say
from pgolf_post.base.ranks import ALONE
from pgolf_post.base.storage import tensors_sha256
from pgolf_post.checkpoint import Checkpoint, save_checkpoint, view_id
from pgolf_post.data import DataFolder
from pgolf_post.errors import MismatchError, NotFoundError, SettingsError
from pgolf_post.families import build_module, load_module
from pgolf_post.score.metric import measure_module, recorded_protocol

KIND = "ema-blend"


@dataclass(frozen=True)
class Synthesis:
    """The snapshots and shares that make an average, and how near they come to it."""

    length: Length
    end_step: int
    snapshots: tuple[Snapshot, ...]
    combination: Combination

    @property
    def parts(self) -> list[tuple[Snapshot, float]]:
        """The snapshots that have a share at all."""
        pairs = zip(self.snapshots, self.combination.shares.tolist(), strict=True)
        return [(snapshot, share) for snapshot, share in pairs if share]


def run_snapshots(checkpoint: Checkpoint) -> list[Snapshot]:
    """Return the snapshots of a checkpoint's run. Raises NotFoundError if it has none, MismatchError on a blend."""
    if checkpoint.meta["kind"] != "raw":
        raise MismatchError(
            f"{checkpoint.path} is a {checkpoint.meta['kind']!r} checkpoint; post-hoc EMA starts from a training run's"
        )
    snapshots = list_snapshots(checkpoint.path.parent)
    if not snapshots:
        raise NotFoundError(
            f"{checkpoint.path.parent} has no {FOLDER}/: its run kept no power-function averages",
            hint="train with optim.power_ema_sigmas = [0.05, 0.10]",
        )
    return snapshots


def find_combination(snapshots: Sequence[Snapshot], length: Length, end_step: int, max_error: float) -> Synthesis:
    """Return the shares for an average of `length` at `end_step`.

    Raises SettingsError if the step is outside the snapshots' part of the run, or the error exceeds `max_error`.
    """
    last = max(snapshot.step for snapshot in snapshots)
    if not 1 <= end_step <= last:
        raise SettingsError(f"--end-step {end_step} is outside 1 … {last}, the steps that the snapshots cover")
    profiles = [snapshot.length.profile(snapshot.step) for snapshot in snapshots]
    combination = combine(profiles, length.profile(end_step))
    if combination.residual > max_error:
        tracks = ", ".join(f"{sigma:g}" for sigma in sorted({snapshot.sigma for snapshot in snapshots}))
        raise SettingsError(
            f"{length} at step {end_step}: reconstruction error {combination.residual:.1%}, limit {max_error:.1%}; "
            f"the run's {len(snapshots)} snapshots are of sigma {tracks}, the nearest of steps "
            f"{_around(snapshots, end_step)}",
            hint="end at a step of which there are snapshots, ask for a length nearer to the tracks', "
            "or accept the error with --max-error",
        )
    return Synthesis(length, end_step, tuple(snapshots), combination)


def _around(snapshots: Sequence[Snapshot], step: int) -> str:
    steps = {snapshot.step for snapshot in snapshots}
    before, after = max((s for s in steps if s <= step), default=step), min(s for s in steps if s >= step)
    return " and ".join(f"{s:,}" for s in sorted({before, after} & steps))


def synthesise(synthesis: Synthesis) -> dict[str, Tensor]:
    """Return Σ share · snapshot in float32, summed in float64. Raises what `stream_tensors` raises."""
    parts = synthesis.parts
    shares = [share for _, share in parts]
    blended = {}
    with progress_bar(f"combining {len(parts)} snapshots", 1, "averages") as advance:
        for name, tensors in stream_tensors([snapshot for snapshot, _ in parts]):
            accumulated = torch.zeros(tensors[0].shape, dtype=torch.float64)
            for share, tensor in zip(shares, tensors, strict=True):
                accumulated.add_(tensor.double(), alpha=share)
            blended[name] = accumulated.float()
        advance()
    return blended


def config_at(checkpoint: Checkpoint, snapshots: Sequence[Snapshot], end_step: int) -> dict[str, Any]:
    """Return the checkpoint's config, with its runtime graph as it was when `end_step` had been made."""
    if end_step == checkpoint.meta["step"]:
        return checkpoint.config
    at = next(snapshot for snapshot in snapshots if snapshot.step >= end_step)
    return {**checkpoint.config, "graph": at.graph}


def posthoc_ema(
    checkpoint: Checkpoint,
    length: Length,
    data: DataFolder,
    end_step: int | None = None,
    max_error: float = MAX_ERROR,
) -> tuple[Checkpoint, bool]:
    """Return an average of `length` at `end_step` (default: the checkpoint's), saved, and whether it was there.

        >>> average, was_there = pg.ema_blend(pg.Checkpoint.open(path), pg.PowerLength(0.10), data)

    The folder's name starts with its content id, so the same average is found again and another never overwrites it.
    """
    # the shares, and the same average from earlier if it is there
    snapshots = run_snapshots(checkpoint)
    end_step = int(checkpoint.meta["step"]) if end_step is None else end_step
    synthesis = find_combination(snapshots, length, end_step, max_error)
    config, meta = config_at(checkpoint, snapshots, end_step), _meta(checkpoint, synthesis)
    if made := _already_made(checkpoint, config, meta):
        return made, True

    # the weights, which may equal those of another folder or of a snapshot
    tensors = {**_buffers(checkpoint), **synthesise(synthesis)}
    path = checkpoint.path.parent / f"ema_{view_id(tensors, config)[:12]}"
    if (path / "meta.json").is_file():
        say(f"{path}: cached")
        return Checkpoint.open(path), True
    meta["no_op"] = tensors_sha256(tensors) in {snapshot.tensors_sha256 for snapshot in snapshots}
    if meta["no_op"]:
        say(f"NO-OP: {length} at step {end_step} is one of the run's snapshots")

    # measured as the run's checkpoints were, then saved
    _, protocol = recorded_protocol(checkpoint, checkpoint.view_name(None))
    metric = measure_module(load_module(config, tensors, path.name).to(ALONE.device), data, protocol)
    return save_checkpoint(path, config, {"raw": tensors}, meta, {"raw": metric}), False


def power_ema(final: Checkpoint, settings: PowerSettings, data: DataFolder) -> tuple[Checkpoint, bool]:
    """Make the average "power-ema" of the table of methods; see `posthoc_ema`."""
    return posthoc_ema(final, PowerLength(settings.sigma), data, settings.end_step, settings.max_error)


def half_life_ema(final: Checkpoint, settings: HalfLifeSettings, data: DataFolder) -> tuple[Checkpoint, bool]:
    """Make the average "half-life-ema" of the table of methods; see `posthoc_ema`."""
    return posthoc_ema(final, ExponentialLength(settings.half_life_steps), data, settings.end_step, settings.max_error)


def _already_made(checkpoint: Checkpoint, config: dict[str, Any], meta: dict[str, Any]) -> Checkpoint | None:
    """Return the folder of the same average, made of the same snapshots in the same shares, if there is one."""
    for path in sorted(checkpoint.path.parent.glob("ema_*/meta.json")):
        made = Checkpoint.open(path.parent)
        if made.config == config and all(made.meta.get(key) == meta[key] for key in ("parents", "ema")):
            say(f"{made.path}: cached")
            return made
    return None


def _buffers(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Return the checkpoint's buffers, which are not averaged. Most models have none."""
    names = [name for name, _ in build_module(checkpoint.config).named_buffers()]
    saved = checkpoint.load("raw").tensors if names else {}
    return {name: saved[name] for name in names if name in saved}


def _meta(checkpoint: Checkpoint, synthesis: Synthesis) -> dict[str, Any]:
    """Return meta.json's facts: parents with their shares, the length asked for and the reconstruction error."""
    length, combination = synthesis.length, synthesis.combination
    parents = [
        {"id": snapshot.tensors_sha256, "view": FOLDER, "folder": snapshot.path.name, "share": share}
        for snapshot, share in synthesis.parts
    ]
    wanted = {"sigma": length.sigma} if isinstance(length, PowerLength) else {"half_life_steps": length.half_life_steps}
    inherited = {key: checkpoint.meta[key] for key in ("run", "train_seconds", "data_dir", "recipe")}
    tokens_per_step = checkpoint.meta["tokens_seen"] / max(checkpoint.meta["step"], 1)
    return {
        "kind": KIND,
        "phase": "blend",
        "step": synthesis.end_step,
        "tokens_seen": round(synthesis.end_step * tokens_per_step),
        "parents": parents,
        "ema": {**wanted, "end_step": synthesis.end_step, "mean_age_steps": mean_age_steps(length, synthesis.end_step)},
        "reconstruction_error": combination.residual,
        "amplification": combination.amplification,
        **inherited,
    }


def mean_age_steps(length: Length, end_step: int) -> float:
    """Return the mean age of the weights in an average, in steps before its end; it compares averages of two kinds."""
    ages = np.arange(end_step - 1, -1, -1, dtype=np.float64)
    return float(length.profile(end_step) @ ages)
