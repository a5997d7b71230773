"""Settings of training for test-time training: the recipe's table `meta_ttt`. meta_ttt.py does what they say."""

from __future__ import annotations

from pydantic import Field

from pgolf_post.settings import Settings
from trainer.schedule.points import LARGEST_RATE


class MetaTTTSettings(Settings):
    """Steps that look ahead to test-time training: one in how many, and what it does there."""

    every: int = Field(ge=1, description="steps from one that adapts first to the next; 1 = all of them")
    inner_lr: float = Field(
        gt=0, le=LARGEST_RATE, description="learning rate of adapting, by plain gradient descent on all parameters"
    )
    inner_steps: int = Field(1, ge=1, description="steps of adapting, all on the same text")
