"""What a calibration is made of: how much text, which, and how deep it looks."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from pgolf_post.settings import Settings

Source = Literal["train", "self", "random"]
Precision = Literal["auto", "fp32", "bf16"]
VALIDATION_NAMES = ("val", "valid", "validation", "eval", "test")
RULE = (
    "validation text is refused: the challenge allows no GPTQ calibration on the text that will be scored "
    "(its rules of legal adaptation: nothing learns from a validation token before that token was scored)"
)


class CalibrationSettings(Settings):
    """The knobs of `calibrate`. All of them are part of the statistics' identity."""

    tokens: int = Field(65536, ge=2, description="tokens to run through the model")
    seed: int = Field(0, ge=0, description="draws the windows, generated text and sampled labels")
    seq_len: int | None = Field(None, ge=1, description="window length; default the model's training length")
    source: Source = Field("train", description="train, self (text that the model writes) or random (for study)")
    temperature: float = Field(1.0, gt=0, description="of the text that the model writes itself")
    fisher: bool = Field(False, description="collect the backward half as well, with labels drawn from the model")
    precision: Precision = Field("auto", description="fp32, bf16 autocast, or auto: bf16 on a GPU, fp32 elsewhere")

    @field_validator("source", mode="before")
    @classmethod
    def _never_validation(cls, value: Any) -> Any:
        if str(value).lower() in VALIDATION_NAMES:
            raise ValueError(RULE)
        return value
