"""What the tests of text-reading methods share: the calibration text that the pico statistics are of."""

from __future__ import annotations

import pytest

from pgolf_post.calibrate import CalibrationSettings
from pgolf_post.calibrate.stage import calibration_text
from pgolf_post.calibrate.text import CalibrationSet
from pgolf_post.checkpoint import View
from pgolf_post.data import DataFolder
from pgolf_post.families import train_seq_len


@pytest.fixture
def text(view: View, pico_data: DataFolder) -> CalibrationSet:
    """640 tokens in windows of 16, as `stats` has them."""
    return calibration_text(view, pico_data, CalibrationSettings(tokens=640), train_seq_len(view.config))
