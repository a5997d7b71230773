"""The `ttt` stage: the validation text under test-time training, each token scored before it is learned from."""

from __future__ import annotations

import json

from pydantic import Field

from pgolf_post.score.ttt.methods import ttt_protocol
from pgolf_post.score.ttt.settings import TTTProtocol
from pgolf_post.sweep.stages.base import Window
from pgolf_post.sweep.stages.whole import WholeTextStage


class TTTStage(WholeTextStage):
    """The validation text under test-time training."""

    preset: str = Field("sgd", description="Preset or method, as `eval --ttt` takes it.")
    set: tuple[str, ...] = Field((), description="KEY=VALUE changes of the preset.")


def protocol(stage: TTTStage, window: Window) -> TTTProtocol:
    """Return the preset with the stage's changes, then the trial's. Raises SettingsError for one that does not fit."""
    changes = [*stage.set, *(f"{key}={json.dumps(value)}" for key, value in window.changes.items())]
    common = {"max_tokens": stage.max_tokens, "seq_len": window.given}
    return ttt_protocol(stage.preset, changes, common, window.seq_len)
