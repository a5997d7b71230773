"""Settings of quantization-aware training: the recipe's table `qat`. `trainer.step.qat` does what they say."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pgolf_post.settings import Settings


class QatSettings(Settings):
    """The plan whose grid training meets, and from when on."""

    at: float = Field(ge=0, lt=1, description="progress from which steps see the weights as the plan would round them")
    plan: str = Field(min_length=1, description="a preset, such as sdclip-1394, or a plan's TOML file")
    mode: Literal["round", "noise"] = Field(
        "round",
        description="round = forward with rounded weights, gradients straight through; noise = add uniform noise of "
        "the grid's step to the weights instead",
    )
