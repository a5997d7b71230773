"""The settings of a fit: no knobs to tune, but switches that take one step out, so that its worth can be measured."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from pgolf_post.quantize.gptq.trellis import POLYNOMIALS
from pgolf_post.settings import Settings


class FitSettings(Settings):
    """Which steps are taken, and how much text each may read. All of it is part of the artifact's identity."""

    rows: bool = Field(True, description="steps differ by row, from the Fisher information of its output")
    columns: bool = Field(True, description="steps differ by column, from what the Hessian leaves of each input")
    row_feedback: bool = Field(
        True, description="errors are fed forward into later rows too, from the Fisher information of outputs together"
    )
    weighted: float = Field(
        0.5, ge=0, le=1, description="share of the Fisher-weighted input moments; the rest is the plain Hessian"
    )
    trellis_states: int = Field(64, description="of the trellis: 4, 8, 16 … 256; 0 = a scalar grid")
    lane_rows: int = Field(512, ge=1, description="rows after which a trellis restarts")
    shrink: bool = Field(False, description="decode towards the centroid: one factor per tensor, in closed form")
    zeros: bool = Field(False, description="columns (of a scalar grid rows, too) whose steps exceed √12·σ become zeros")
    kappa: Literal["off", "role", "tensor"] = Field(
        "tensor", description="what is quantized alone to see how wrong the quadratic model is: tensor, role, or off"
    )
    kappa_tokens: int = Field(8192, ge=2, description="training tokens that each of these measurements reads")
    kappa_seed: int = Field(0, ge=0, description="draws the text of those measurements")

    floats: Literal["fp16", "bf16"] = Field("bf16", description="how what is no matrix is stored")
    tune_tokens: int = Field(
        0,
        ge=0,
        description="tokens of calibration text, in all, on which blocks not rounded yet are tuned; 0: none",
    )
    distill: bool = Field(False, description="tune what stays float by distillation, with symbols frozen")

    hessian_share: float = Field(1.0, ge=0, le=1, description="off-diagonal moments are multiplied by it")
    ridge: float = Field(0.003, gt=0, description="added to the moments' diagonal, as a share of its mean")
    row_trust: float = Field(0.8, ge=0, le=1, description="exponent of the row statistics; the rest is their mean")
    lookup_floor: float = Field(0.03, gt=0, le=1, description="least sensitivity of a table's row, to the mean")

    @field_validator("trellis_states")
    @classmethod
    def _known(cls, states: int) -> int:
        if states and states not in POLYNOMIALS:
            raise ValueError(
                f"a trellis of {states} states; there are {', '.join(map(str, POLYNOMIALS))}, and 0 for none"
            )
        return states
