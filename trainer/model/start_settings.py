"""Settings of starts that read the training text; `trainer.start.from_text` acts on them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from trainer.model.layers import with_attention
from trainer.model.parts import Part, Whole


class StartSettings(Part):
    """Starts of weights that the training text decides."""

    qk_init: Literal["orthogonal", "cooccurrence"] = Field(
        "orthogonal", description="start of block 0's queries and keys: orthogonal, or the co-occurrence of tokens"
    )


def check_starts(settings: Whole) -> None:
    """Raise ValueError where there is no attention to start."""
    if settings.qk_init == "cooccurrence" and not with_attention(settings)[0]:
        raise ValueError("qk_init 'cooccurrence' starts block 0's attention, which this model does not have")


def reads_text(settings: Whole) -> bool:
    """Return whether a model's start reads the training text."""
    return settings.qk_init == "cooccurrence" or settings.output_bias == "unigram"
