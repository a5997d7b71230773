"""Tokens of a step in a run with stages: windows of one stage are parts of the longest stage's windows.

The text is shuffled in windows of the longest length, as `WindowSampler` does; shorter windows are those, cut, in
order. So no stage reads again what another has read, whatever their lengths.
"""

from __future__ import annotations

import numpy as np

from pgolf_post.data import DataFolder
from trainer.schedule.stages import StagePlace
from trainer.step.batches import WindowSampler


class StagedSampler(WindowSampler):
    """The windows of one stage, in the order that the seed draws for the longest ones."""

    def __init__(self, data: DataFolder, place: StagePlace, longest: int, seed: int) -> None:
        super().__init__(data, longest, seed)
        self.stage, self.origin = place.stage, place.token(0)  # steps are counted over the whole run

    def window(self, position: int) -> np.ndarray:  # (the stage's seq_len + 1,) int64
        """Return the window after `position` others, all steps of the run counted as steps of this stage."""
        number, within = divmod(self.origin + position * self.stage.seq_len, self.seq_len)
        return super().window(number)[within : within + self.stage.seq_len + 1]
