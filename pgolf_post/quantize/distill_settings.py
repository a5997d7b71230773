"""How the floats that quantization leaves are tuned, as settings: what a plan holds without loading the machinery."""

from __future__ import annotations

from pydantic import Field

from pgolf_post.settings import Settings


class DistillSettings(Settings):
    """How the remaining floats are tuned. All of it is part of the artifact's identity."""

    tokens: int = Field(32768, ge=2, description="calibration tokens, the held-out ones included; the text's first")
    steps: int = Field(100, ge=1, description="optimizer steps")
    learning_rate: float = Field(0.001, gt=0, le=1, description="AdamW's at the start; cosine to zero")
    batch_tokens: int = Field(2048, ge=1, description="tokens per step; one window at least")
    holdout: float = Field(0.125, gt=0, lt=1, description="share of the windows that decides whether it is kept")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's")
    seed: int = Field(0, ge=0, description="which windows are held out, and the order of the others")
