"""Forms of the residual stream: its mix with the embedding, norms of what is added to it, norms at skips.

A sandwich norm (Ding et al. 2021, CogView) normalises what attention, or attention and MLP, add. Skips can be
normalised before they are weighed, or the stream after they are added, which keeps it from growing with depth.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from trainer.model.parts import Part, Whole


class ResidualSettings(Part):
    """Forms of the residual stream."""

    x0_mix: bool = Field(True, description="each block mixes the embedding x0 into its input; false = no such path")
    sandwich_norm: Literal["none", "attention", "both"] = Field(
        "none", description="normalise what attention, or attention and MLP, add to the stream"
    )
    skip_norm: Literal["none", "before", "after"] = Field(
        "none", description="normalise a skip before it is weighed, or the stream after it was added"
    )


def check_residual(settings: Whole) -> None:
    """Raise ValueError where forms of the stream exclude each other."""
    if not settings.x0_mix and settings.visit_controls:
        raise ValueError("visit_controls gives every visit a mix of its own; x0_mix = false leaves none")
