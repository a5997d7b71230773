"""Settings of quantization-aware training: the recipe's table `qat`. `trainer.step.qat` does what they say."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pgolf_post.settings import Settings

PLANNED = ("round", "noise")  # modes that take a plan's grid


class QatSettings(Settings):
    """The rounding that training meets, and from when on: a plan's grid, or what `fit` will leave."""

    at: float = Field(ge=0, lt=1, description="progress from which steps see the weights as rounding will leave them")
    plan: str | None = Field(
        None, min_length=1, description="of modes round and noise: a preset, such as sdclip-1394, or a plan's TOML file"
    )
    mode: Literal["round", "noise", "fit", "rate"] = Field(
        "round",
        description="round = forward with rounded weights, gradients straight through; noise = add uniform noise of "
        "the grid's step to the weights instead; fit = add noise as `fit` will leave it, + in one half of the "
        "micro-batches and - in the other; rate = weights as they are, with qat.rate alone",
    )
    bits: float | None = Field(
        None, gt=0, le=16, description="of modes fit and rate: bits a weight that the artifact will have"
    )
    rate: Annotated[float, Field(ge=0)] | Literal["front"] = Field(
        0.0,
        description="of modes fit and rate: nats a token that one bit of the artifact costs in the loss; front = the "
        "slope of fit's front at qat.bits; 0 = nothing",
    )
    every: int = Field(8, ge=1, description="of modes fit and rate: steps between refreshes of their moments")

    @model_validator(mode="after")
    def _acts(self) -> QatSettings:
        if self.mode in PLANNED:
            if self.plan is None:
                raise ValueError(f'mode "{self.mode}" needs plan, a preset such as sdclip-1394')
            for key in ("bits", "rate", "every"):
                value = getattr(self, key)
                if value != type(self).model_fields[key].default:
                    raise ValueError(
                        f'{key} {value} acts only with mode "fit" or "rate": a plan\'s steps move with the size of a '
                        "row, and its bits do not depend on it"
                    )
            return self
        if self.plan is not None:
            raise ValueError(
                f'plan "{self.plan}" acts only with mode "round" or "noise"; fit\'s steps follow from bits'
            )
        if self.bits is None:
            raise ValueError(f'mode "{self.mode}" needs bits, for example 2.5: the bytes of the artifact × 8 ÷ weights')
        if self.mode == "rate" and not self.rate:
            raise ValueError('mode "rate" needs rate, "front" or nats a token for each bit')
        return self
