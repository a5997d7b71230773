"""The `plain` stage: the validation text in windows that do not overlap."""

from __future__ import annotations

from pgolf_post.score.plain import PlainProtocol
from pgolf_post.sweep.stages.base import Window
from pgolf_post.sweep.stages.whole import WholeTextStage


class PlainStage(WholeTextStage):
    """The validation text in plain windows."""


def protocol(stage: PlainStage, window: Window) -> PlainProtocol:
    """Return the protocol of plain windows."""
    return PlainProtocol(seq_len=window.seq_len, max_tokens=stage.max_tokens)
