"""The calibration set: the text that statistics are collected on, the same for any number of processes.

It has three sources. `train`: distinct windows of the training split, an explicit list of (shard, offset, length) drawn
by seed. `self`: windows that the model writes itself (generate.py), if no training text may be used. `random`: uniform
token ids, for study; published results calibrated on them are visibly worse. Validation text is refused: it will be
scored, and the challenge forbids calibrating on it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from pgolf_post.calibrate.randomness import generator
from pgolf_post.calibrate.settings import RULE, CalibrationSettings
from pgolf_post.data import DataFolder
from pgolf_post.errors import MismatchError

Span = tuple[str, int, int]  # shard file name, offset, length


@dataclass(frozen=True)
class CalibrationSet:
    """The tokens of the windows, and where each lies in the training split (source `train` only)."""

    spans: tuple[Span, ...]
    tokens: np.ndarray  # (windows, seq_len) int64

    @property
    def sha256(self) -> str:
        """Return the hash of the tokens, whatever shards they come from."""
        shape = f"{self.tokens.shape}\0".encode()
        return hashlib.sha256(shape + self.tokens.astype("<u2").tobytes()).hexdigest()


def num_windows(tokens: int, seq_len: int) -> int:
    """Return the number of whole windows that the wanted tokens make, at least one."""
    return max(1, tokens // seq_len)


def draw_training_text(data: DataFolder, settings: CalibrationSettings, seq_len: int) -> CalibrationSet:
    """Draw distinct windows of the training split by a calibration's settings. Raises what `draw_windows` does."""
    return draw_windows(data, settings.tokens, settings.seed, seq_len)


def training_tokens(data: DataFolder, seq_len: int) -> int:
    """Return how many tokens of the training split lie in whole windows: the most that can be drawn."""
    return sum(len(shard) // seq_len for _, shard in data.shards("train")) * seq_len


def draw_windows(data: DataFolder, tokens: int, seed: int, seq_len: int) -> CalibrationSet:
    """Draw distinct windows of the training split: as many whole ones as `tokens` make, at least one.

    Raises MismatchError if it holds too few, or if a training shard is validation text.
    """
    refuse_validation_shards(data)
    places = [
        (path, shard, offset)
        for path, shard in data.shards("train")
        for offset in range(0, len(shard) - seq_len + 1, seq_len)
    ]
    wanted = num_windows(tokens, seq_len)
    if wanted > len(places):
        raise MismatchError(
            f"{data.path}: {tokens} calibration tokens need {wanted} windows of {seq_len}, "
            f"the training split has {len(places)}",
            hint=f"--calibration-tokens {len(places) * seq_len}",
        )
    chosen = generator(seed, "windows").choice(len(places), size=wanted, replace=False)
    windows = [places[i] for i in sorted(chosen)]
    rows = [shard[offset : offset + seq_len] for _, shard, offset in windows]
    spans = tuple((path.name, offset, seq_len) for path, _, offset in windows)
    return CalibrationSet(spans, np.stack(rows).astype(np.int64))


def random_text(vocab_size: int, settings: CalibrationSettings, seq_len: int) -> CalibrationSet:
    """Return windows of uniform token ids."""
    rows = [
        generator(settings.seed, "random tokens", window).integers(0, vocab_size, seq_len)
        for window in range(num_windows(settings.tokens, seq_len))
    ]
    return CalibrationSet((), np.stack(rows).astype(np.int64))


def refuse_validation_shards(data: DataFolder) -> None:
    """Raise MismatchError naming a shard of the training split that is, by name or content, validation text."""
    splits = data.manifest["splits"]
    validation = {shard["sha256"]: shard["file"] for shard in splits.get("val", {}).get("shards", [])}
    for shard in splits.get("train", {}).get("shards", []):
        same = validation.get(shard["sha256"])
        if same is not None or "_val_" in shard["file"]:
            twin = f" (the same content as {same})" if same else ""
            raise MismatchError(
                f"{data.path}: training shard {shard['file']}{twin} is validation text; {RULE}",
                hint="calibrate on training text (--data FOLDER) or on the model's own: --calibration-source self",
            )
