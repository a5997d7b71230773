"""Paths to attention's values beside the normalised stream: earlier values, and the embedding itself.

A value residual (Zhou et al. 2024, "Value Residual Learning") mixes each visit's values with those of the first visit;
in a cascade it mixes them with those of the visit before, already mixed, so that deep layers can pass values on. The
embedding x0 reaches the values of chosen layers through their own value matrix: v = V(x + share · norm(x0)).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from trainer.model.layers import check_listed_once, with_attention
from trainer.model.parts import Part, Whole


class ValueSettings(Part):
    """Forms of the value residual, and layers whose values read the embedding."""

    value_residual_from: Literal["first", "previous"] = Field(
        "first", description="visit whose values the value residual mixes in: the first, or the one before"
    )
    value_residual_init: float = Field(
        0.0, description="starting share of earlier values; those of the visit itself have the rest"
    )
    value_x0_layers: tuple[int, ...] = Field((), description="layers whose values read the embedding x0 too")
    value_x0_init: float = Field(0.0, description="starting share of x0 in the input of those values")


def check_value_paths(settings: Whole) -> None:
    """Raise ValueError where a setting of values could not act."""
    if not settings.value_residual and (settings.value_residual_from != "first" or settings.value_residual_init):
        raise ValueError("value_residual_from and value_residual_init do nothing without value_residual = true")
    check_listed_once("value_x0_layers", settings.value_x0_layers, settings.num_layers)
    lacking = [layer for layer in settings.value_x0_layers if not with_attention(settings)[layer]]
    if lacking:
        raise ValueError(f"value_x0_layers: layer {lacking[0]} has no attention")
    if settings.value_x0_init and not settings.value_x0_layers:
        raise ValueError(f"value_x0_init {settings.value_x0_init} does nothing without value_x0_layers")
