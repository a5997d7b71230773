"""The `sliding` stage: the validation text in windows that overlap, so that every target has a long context."""

from __future__ import annotations

from pydantic import Field

from pgolf_post.score.sliding import SlidingProtocol
from pgolf_post.settings import parse_settings
from pgolf_post.sweep.stages.base import Window
from pgolf_post.sweep.stages.whole import WholeTextStage


class SlidingStage(WholeTextStage):
    """The validation text in windows that overlap."""

    stride: int = Field(64, ge=1, description="Targets that each window scores.")


def protocol(stage: SlidingStage, window: Window) -> SlidingProtocol:
    """Return the protocol of overlapping windows. Raises SettingsError for a stride longer than the window."""
    fields = {"seq_len": window.seq_len, "stride": stage.stride, "max_tokens": stage.max_tokens}
    return parse_settings(SlidingProtocol, fields, "[stages.sliding]")
