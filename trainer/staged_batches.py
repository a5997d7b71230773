"""Tokens of a step in a run with stages: windows of one stage are parts of the longest stage's windows.

The text is shuffled in windows of the longest length, as `WindowSampler` does; shorter windows are those, cut, in
order. So no stage reads again what another has read, whatever their lengths.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from pgolf_post.data import DataFolder
from trainer.batches import WindowSampler
from trainer.stages import StagePlace


class StagedSampler:
    """The windows of one stage, in the order that the seed draws for the longest ones."""

    def __init__(self, data: DataFolder, place: StagePlace, longest: int, seed: int) -> None:
        self.place, self.longest = place, longest
        self.whole = WindowSampler(data, longest, seed)

    def step_batches(
        self,
        step: int,
        windows_per_step: int,
        windows_per_batch: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> Iterator[tuple[Tensor, Tensor]]:  # (inputs, targets), each (windows_per_batch, seq_len) int64
        """Yield this rank's micro-batches of step `step`, counted over the whole run, as WindowSampler does."""
        seq_len, begins = self.place.stage.seq_len, self.place.token(step)
        for start in range(rank * windows_per_batch, windows_per_step, world_size * windows_per_batch):
            numbers = range(start, start + windows_per_batch)
            windows = torch.from_numpy(np.stack([self._window(begins + number * seq_len) for number in numbers]))
            yield windows[:, :-1], windows[:, 1:]

    def _window(self, token: int) -> np.ndarray:  # (seq_len + 1,) int64
        """Return the window that begins at a position in the order of the text."""
        number, within = divmod(token, self.longest)
        return self.whole.window(number)[within : within + self.place.stage.seq_len + 1]
