"""`diagnose`: the numbers of a view, from the cache, or else measured and stored.

The key is the view, the text by content and the settings. Marks are not stored: rules of thumb are looked up when a
diagnosis is read, so that a new rule also speaks of old results.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from pgolf_post.base.storage import read_json, write_json
from pgolf_post.calibrate.settings import CalibrationSettings
from pgolf_post.calibrate.text import CalibrationSet, draw_training_text
from pgolf_post.checkpoint import View
from pgolf_post.data import DataFolder
from pgolf_post.derived import Stage, derived_folders
from pgolf_post.diagnose.activations import activation_numbers, on_device
from pgolf_post.diagnose.embeddings import embedding_numbers
from pgolf_post.diagnose.headline import headline
from pgolf_post.diagnose.numbers import Number
from pgolf_post.diagnose.removal import removal_numbers
from pgolf_post.diagnose.rules import Mark, find_marks
from pgolf_post.diagnose.scalars import scalar_numbers
from pgolf_post.diagnose.settings import DiagnoseSettings
from pgolf_post.diagnose.weights import weight_numbers
from pgolf_post.errors import NotFoundError, NumericsError
from pgolf_post.settings import parse_settings

PAYLOAD = "numbers.json"
DIAGNOSIS = Stage("diagnosis", 1, PAYLOAD)


@dataclass(frozen=True)
class Diagnosis:
    """The numbers of one view, on disk in `folder`."""

    folder: Path
    view_id: str
    step: int
    numbers: Sequence[Number]
    seconds: float
    cached: bool

    @cached_property
    def marks(self) -> list[Mark]:
        """The numbers that a rule of thumb knows as bad, the worst first."""
        return find_marks(self.numbers)

    def facts(self) -> dict[str, Any]:
        """Return the diagnosis as JSON."""
        return {
            "diagnosis": str(self.folder),
            "checkpoint_id": self.view_id,
            "step": self.step,
            "numbers": [number.facts() for number in self.numbers],
            "marks": [mark.facts() for mark in self.marks],
            "cached": self.cached,
            "diagnose_seconds": self.seconds,
        }


def diagnose(
    view: View,
    data: DataFolder | None = None,
    settings: DiagnoseSettings = DiagnoseSettings(),  # noqa: B008 (frozen)
    fresh: bool = False,
) -> Diagnosis:
    """Measure a view's weights and learned scalars, and with `data` its activations on training text; cached.

        >>> pg.diagnose(view, data).marks[0].facts()

    Raises NotFoundError if text is asked for and no data are given, MismatchError if the training text is too short,
    NumericsError if singular values do not converge or activations are not finite.
    """
    if data is None and settings.tokens:
        raise NotFoundError(
            f"{view.checkpoint.path}: activations need training text, and there is no data folder",
            hint="pgolf-post diagnose --data FOLDER   (or the weights alone: --tokens 0)",
        )
    text = _text(view, data, settings) if data is not None and settings.tokens else None
    identity = _identity(view, data, settings, text)
    folder = view.checkpoint.derived(DIAGNOSIS.name, DIAGNOSIS.id([view.id], identity))

    def make(building: Path) -> Mapping[str, Any]:
        numbers = _measure(view, data, settings, text)
        write_json(building / PAYLOAD, {"numbers": [number.facts() for number in numbers]})
        facts = {"view_id": view.id, "step": int(view.checkpoint.meta["step"]), "num_numbers": len(numbers)}
        return {**facts, "headline": headline(numbers)}

    config = {"view": view.name, "view_id": view.id, **identity}
    _, cached = DIAGNOSIS.load_or_make(folder, config, make, fresh)
    return open_diagnosis(folder, cached)


def open_diagnosis(folder: Path, cached: bool = True) -> Diagnosis:
    """Read a stored diagnosis. Raises DamagedFileError, NotFoundError."""
    meta, numbers = read_json(folder / "meta.json"), read_json(folder / PAYLOAD)["numbers"]
    rows = [Number.from_facts(facts) for facts in numbers]
    return Diagnosis(folder, str(meta["view_id"]), int(meta["step"]), rows, float(meta["seconds"]), cached)


def stored_diagnoses(checkpoint: Path) -> list[Path]:
    """Return the folders of a checkpoint's finished diagnoses, the newest last."""
    own = [folder for folder in derived_folders(checkpoint) if folder.parent.name == DIAGNOSIS.name]
    return sorted(own, key=lambda folder: (folder / "meta.json").stat().st_mtime)


def _text(view: View, data: DataFolder, settings: DiagnoseSettings) -> CalibrationSet:
    seq_len = settings.seq_len or view.train_seq_len
    drawn = parse_settings(CalibrationSettings, {"tokens": settings.tokens, "seed": settings.seed}, "diagnose")
    return draw_training_text(data, drawn, seq_len)


def _identity(
    view: View, data: DataFolder | None, settings: DiagnoseSettings, text: CalibrationSet | None
) -> dict[str, Any]:
    """Return what decides a diagnosis besides the view."""
    return {
        **settings.model_dump(mode="json"),
        "seq_len": settings.seq_len or view.train_seq_len,
        "text_sha256": text.sha256 if text else None,
        "tokenizer_sha256": data.tokenizer_sha256 if data else None,
    }


def _measure(
    view: View, data: DataFolder | None, settings: DiagnoseSettings, text: CalibrationSet | None
) -> list[Number]:
    numbers = [*weight_numbers(view), *scalar_numbers(view)]
    lookups = view.family.lookups(view.module)
    if lookups:
        table = lookups[0].tensor
        numbers += embedding_numbers(table, view.tensors[table], data.tokenizer if data else None)
    if text is not None:
        module, tokens = on_device(view), torch.from_numpy(text.tokens)
        numbers += activation_numbers(view, module, tokens)
        if settings.removal_tokens:
            numbers += removal_numbers(view, module, tokens, settings.removal_tokens)
    _require_finite(numbers, view)
    return numbers


def _require_finite(numbers: Sequence[Number], view: View) -> None:
    """Raise NumericsError naming the first number that is NaN or infinite."""
    for number in numbers:
        if number.value is not None and not math.isfinite(number.value):
            raise NumericsError(
                f"{view}: {number.metric} of {number.subject} is {number.value}",
                hint=f"pgolf-post checkpoint verify {view.checkpoint.path}",
            )
