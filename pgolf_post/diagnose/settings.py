"""The settings of a diagnosis: which text runs through the model, and how much of it."""

from __future__ import annotations

from pydantic import Field

from pgolf_post.settings import LARGEST_SEED, Settings


class DiagnoseSettings(Settings):
    """The settings of `diagnose`, all part of the result's identity."""

    tokens: int = Field(8192, ge=0, description="Training tokens to run through the model; 0 for the weights alone.")
    removal_tokens: int = Field(
        2048, ge=0, description="Tokens on which the removal of each block is measured; 0 for none."
    )
    seed: int = Field(0, ge=0, le=LARGEST_SEED, description="Seed of the windows.")
    seq_len: int | None = Field(None, ge=2, description="Tokens per window; left out, the model's training length.")
