"""The settings of a calibration: which text and how much, in which precision, with or without the backward half."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from pgolf_post.settings import LARGEST_SEED, Settings

Source = Literal["train", "self", "random"]
Precision = Literal["auto", "fp32", "bf16"]
VALIDATION_NAMES = ("val", "valid", "validation", "eval", "test")
RULE = (
    "validation text is refused: the challenge allows no GPTQ calibration on the text that will be scored "
    "(its rules of legal adaptation: nothing learns from a validation token before that token was scored)"
)


class CalibrationSettings(Settings):
    """The settings of `calibrate`, all part of the statistics' identity."""

    tokens: int = Field(65536, ge=2, description="Number of tokens to run through the model.")
    seed: int = Field(0, ge=0, le=LARGEST_SEED, description="Seed of the windows, generated text and sampled labels.")
    seq_len: int | None = Field(None, ge=1, description="Tokens per window; left out, the model's training length.")
    source: Source = Field(
        "train", description="Training text, text that the model writes itself, or random ids (for study)."
    )
    temperature: float = Field(1.0, gt=0, description="Sampling temperature of text that the model writes itself.")
    fisher: bool = Field(False, description="Also collect the backward half, with labels drawn from the model.")
    precision: Precision = Field(
        "auto",
        description="Type of the forward pass; auto is bf16 on a GPU, fp32 elsewhere.",
    )

    @field_validator("source", mode="before")
    @classmethod
    def _never_validation(cls, value: object) -> object:
        if str(value).lower() in VALIDATION_NAMES:
            raise ValueError(RULE)
        return value
