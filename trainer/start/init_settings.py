"""Settings of a run that starts from another model's weights; init_from.py acts on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from pgolf_post.settings import Settings

IDENTITY = -1  # in `layers`: a new layer that starts as the identity


class InitSettings(Settings):
    """The checkpoint that a run's weights start from, and what becomes of layers that it lacks. Off by default."""

    checkpoint: Path | None = Field(None, description="checkpoint folder whose weights the run starts from")
    weights: Literal["raw", "ema", "swa"] | None = Field(
        None, description="which weights of that folder; default EMA where it has one, else raw"
    )
    layers: tuple[int, ...] | None = Field(
        None,
        description="for each layer of this model, the layer of that one whose weights it copies; -1 = a new layer, "
        "which starts as the identity; default the same layer, and new ones where the function stays",
    )
    fresh: tuple[str, ...] = Field(
        (), description='tensors, by pattern, that start by the model\'s own init all the same: "bigram.*"'
    )

    @model_validator(mode="after")
    def _acts(self) -> InitSettings:
        for key in ("weights", "layers", "fresh"):
            if self.checkpoint is None and getattr(self, key):
                raise ValueError(f"{key} acts only with init.checkpoint (--init-from)")
        if wrong := [layer for layer in self.layers or () if layer < IDENTITY]:
            raise ValueError(f"layers: {wrong[0]} is no layer; layers count from 0, {IDENTITY} is a new one")
        return self

    @property
    def is_on(self) -> bool:
        """Whether the run starts from another model's weights."""
        return self.checkpoint is not None

    def settings_on(self) -> dict[str, Any]:
        """Return the settings that are not at their defaults, as plain values."""
        return self.model_dump(mode="json", exclude_defaults=True)
