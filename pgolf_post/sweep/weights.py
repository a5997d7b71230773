"""Weights that trials start from: a checkpoint's, a blend's, a moving average's, or those of a run trained for it.

Averages are made in memory, as `swa-blend` and `ema-blend` make them, and held while trials use them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch

from pgolf_post.average.linear import linear_blend, require_trained, swa_parts
from pgolf_post.average.posthoc import config_at, find_combination, run_snapshots, synthesise
from pgolf_post.average.profiles import ExponentialLength, Length, PowerLength
from pgolf_post.checkpoint import Checkpoint, View, default_checkpoint, view_id
from pgolf_post.elsewhere import results_in
from pgolf_post.families import build_module, get_family
from pgolf_post.sweep.claims import claim
from pgolf_post.sweep.places import Places
from pgolf_post.sweep.recent import Recent
from pgolf_post.sweep.settings import BlendStage, EmaStage, TrialSettings
from pgolf_post.sweep.spending import Spending
from pgolf_post.sweep.trainer_process import Asked
from pgolf_post.sweep.training import TrainingStoppedError, run_id, trained

FIELDS = {"checkpoint", "weights", "train", "blend", "ema"}  # of a trial's settings: those that decide its weights
JITTER = 1e-4


class Weights:
    """Finds, makes and holds trials' weights."""

    def __init__(self, places: Places, spending: Spending) -> None:
        self.places, self.spending = places, spending
        self.asked: dict[str, Asked] = {}  # who asks for a training, by its id
        self.seconds_left: Callable[[], float | None] = lambda: None  # of the sweep's budget; None without one
        self._views = Recent[View]()

    def checkpoint(self, settings: TrialSettings) -> Checkpoint:
        """Return the checkpoint that a trial starts from; trained first, where it says so.

        Raises NotFoundError, DamagedFileError as `Checkpoint.open` does, TrainingStoppedError if training ended early,
        PgolfError if it fails.
        """
        if settings.train:
            name = f"train-{run_id(settings.train)}"
            with self.spending.timed("train"), claim(self.places.locks, name, wait=True, inherit=True):
                asked = self.asked.get(run_id(settings.train))
                scratch = self.places.results / "recipes"
                return trained(settings.train, self.places.root, scratch, asked, self.seconds_left)
        if settings.checkpoint:
            return Checkpoint.open(Path(settings.checkpoint))
        if self.places.checkpoint:
            return Checkpoint.open(self.places.checkpoint)
        return self._default

    @cached_property
    def _default(self) -> Checkpoint:
        return default_checkpoint(self.places.root)

    def source_ids(self, settings: TrialSettings) -> list[str]:
        """Return the ids of the files that a trial's weights are made of, without reading them."""
        if settings.train:
            return [f"train:{run_id(settings.train)}", settings.weights or ""]
        checkpoint = self.checkpoint(settings)
        if settings.blend:
            require_trained(checkpoint)
            parts = swa_parts(checkpoint, settings.blend.ema_share, settings.blend.selection())
            return [f"{part.share!r}:{part.checkpoint.view_id(part.view)}" for part in parts]
        if settings.ema:
            return [snapshot.tensors_sha256 for snapshot in run_snapshots(checkpoint)]
        return [checkpoint.view_id(settings.weights)]

    def view(self, settings: TrialSettings) -> View:
        """Return a trial's weights."""
        key = json.dumps(settings.model_dump(mode="json", include=FIELDS), sort_keys=True)
        if key not in self._views:
            checkpoint = self.checkpoint(settings)
            with self.spending.timed("weights"):
                self._views.keep(key, self._at_home(_load(checkpoint, settings)))
        return self._views[key]

    def _at_home(self, view: View) -> View:
        """Return a view whose checkpoint is the folder that keeps its results."""
        derived = self.places.derived
        return view if derived is None else replace(view, checkpoint=results_in(view.checkpoint, derived))

    def num_blocks(self, settings: TrialSettings) -> int:
        """Return how many blocks the model of a trial has."""
        try:
            config = self.checkpoint(settings).config
        except TrainingStoppedError as stopped:
            config = stopped.checkpoint.config
        return get_family(config["family"]).num_layers(build_module(config))


def _load(checkpoint: Checkpoint, settings: TrialSettings) -> View:
    if settings.blend:
        return _blended(checkpoint, settings.blend)
    if settings.ema:
        return _averaged(checkpoint, settings.ema)
    return checkpoint.load(settings.weights)


def _blended(checkpoint: Checkpoint, wanted: BlendStage) -> View:
    require_trained(checkpoint)
    blend = linear_blend(swa_parts(checkpoint, wanted.ema_share, wanted.selection()))
    config = blend.reference.config
    return View(blend.reference, "raw", view_id(blend.tensors, config), blend.tensors)


def _averaged(checkpoint: Checkpoint, wanted: EmaStage) -> View:
    """Average snapshots; buffers, which they do not hold, are the checkpoint's own."""
    snapshots, step = run_snapshots(checkpoint), int(checkpoint.meta["step"])
    made = synthesise(find_combination(snapshots, _length(wanted), step, wanted.max_error))
    buffers = [name for name, _ in build_module(checkpoint.config).named_buffers()]
    saved = checkpoint.load("raw").tensors if buffers else {}
    tensors = {**{name: saved[name] for name in buffers if name in saved}, **made}
    config = config_at(checkpoint, snapshots, step)
    return View(checkpoint, "raw", view_id(tensors, config), tensors)


def _length(wanted: EmaStage) -> Length:
    if wanted.sigma is not None:
        return PowerLength(wanted.sigma)
    assert wanted.half_life_steps is not None
    return ExponentialLength(wanted.half_life_steps)


def jittered(view: View, seed: int) -> View:
    """Return the weights with each row moved at random by up to ±1e-4 of itself against its scale; for seed 0 as is.

    Scales are stored in fp16, whose steps are wider than that: a scale jittered by 1e-4 would mostly be rounded back.
    So the row moves instead of its scale, which to the rounding is the same.
    """
    if not seed:
        return view
    generator = torch.Generator().manual_seed(seed)
    moved = {}
    for name, tensor in view.tensors.items():
        if tensor.ndim > 1:
            rows = 2 * torch.rand(len(tensor), generator=generator) - 1
            tensor = tensor * (1 + JITTER * rows).reshape(-1, *[1] * (tensor.ndim - 1))
        moved[name] = tensor
    return replace(view, tensors=moved)
