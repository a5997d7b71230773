"""Settings of a fit: switches that take one step out, so that its worth can be measured, and amounts of text."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from pgolf_post.quantize.gptq.trellis import DIAGONALS, POLYNOMIALS
from pgolf_post.settings import LARGEST_SEED, Precision, PrecisionIdentity

# An id names what they lead to, not their values.
TUNING_FIELDS = {"distill", "tune_tokens", "tune_precision", "tune_source", "tune_optimizer"}
BEFORE = {"lookup_frequency": "counted", "tune_optimizer": "adam"}  # there was a choice; ids are older and lack them


class FitSettings(PrecisionIdentity):
    """Optional parts of a fit, and the text each may read. All settings are part of the artifact's identity."""

    rows: bool = Field(True, description="Use per-row step sizes, from the Fisher information of each output.")
    columns: bool = Field(
        True, description="Use per-column step sizes, from the pivots of the Hessian's LDLᵀ factorization."
    )
    row_feedback: bool = Field(
        True,
        description="Feed errors forward into later rows too, by the outputs' second moment of gradients.",
    )
    weighted: float = Field(
        0.5, ge=0, le=1, description="Share of the Fisher-weighted Hessian; the rest is the plain one."
    )
    trellis_states: int = Field(256, description="States of the trellis: 4, 8, 16 … 256; 0 rounds to a scalar grid.")
    lane_rows: int = Field(
        0, ge=0, description="Rows after which a trellis restarts; 0 runs it along anti-diagonals, which is faster."
    )
    shrink: bool = Field(False, description="Decode towards the centroid: one factor per tensor, in closed form.")
    zeros: bool = Field(False, description="Zero columns (and rows of a scalar grid) whose steps exceed √12·σ.")
    kappa: Literal["off", "role", "tensor"] = Field(
        "tensor",
        description="Granularity of the κ correction (measured ÷ predicted loss): per tensor, per role, or off.",
    )
    kappa_tokens: int = Field(8192, ge=2, description="Training tokens that each measurement of κ reads.")
    kappa_seed: int = Field(0, ge=0, le=LARGEST_SEED, description="Seed that draws the text on which κ is measured.")

    floats: Literal["fp16", "bf16"] = Field("bf16", description="Storage type of non-matrix parameters.")
    tune_tokens: int = Field(
        0,
        ge=0,
        description="Tokens of text, in all, to fine-tune blocks that are not rounded yet; 0 tunes none.",
    )
    tune_source: Literal["train", "self"] = Field(
        "train",
        description="Text to fine-tune on, as much as --tune-tokens: from the training split, or written by the model.",
    )
    tune_optimizer: Literal["adam", "preconditioned"] = Field(
        "preconditioned",
        description="Steps of fine-tuning: along gradients preconditioned by the sensitivities, with non-matrix "
        "parameters tuned as well; or Adam's, of matrices alone.",
    )
    tune_precision: Precision = Field(
        "fp32",
        description="Type of the products in fine-tuning; bf16 is faster on a GPU. κ is always measured in fp32.",
    )
    distill: bool = Field(False, description="Tune non-matrix parameters by distillation, with symbols frozen.")

    hessian_share: float = Field(1.0, ge=0, le=1, description="Factor on off-diagonal entries of Hessians.")
    ridge: float = Field(0.003, gt=0, description="Ridge added to the diagonal of Hessians, as a share of its mean.")
    coupling: float = Field(
        1.0, ge=0, le=1, description="Factor on off-diagonal entries of the outputs' second moment of gradients."
    )
    regularize: Literal["fixed", "rate"] = Field(
        "rate",
        description="Below 3 bits a weight try four pairs of coupling and ridge on κ's text and take the one that "
        "loses least (rate). Nothing is tried where either is given, where κ is off, or with fixed.",
    )
    row_trust: float = Field(0.8, ge=0, le=1, description="Exponent of the row statistics; 0 gives every row the mean.")
    lookup_frequency: Literal["counted", "expected"] = Field(
        "expected",
        description="How often a row of a lookup table is taken to be looked up: as often as in the text of the "
        "statistics, or as often as such counts let expect of other text.",
    )
    lookup_floor: float = Field(
        0.03, gt=0, le=1, description="Least sensitivity of a row of a lookup table, relative to the mean."
    )

    @model_serializer(mode="wrap")
    def _identity(self, own_values: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what ids are older than, where it is at its default and does nothing."""
        values = PrecisionIdentity._identity(self, own_values)
        idle = (
            {"tune_source": "train"}
            if self.tune_tokens
            else {"tune_source": "train", "tune_optimizer": "preconditioned"}
        )
        return {key: value for key, value in values.items() if idle.get(key) != value}

    def identity(self, exclude: Collection[str] = ()) -> dict[str, Any]:
        """Return what ids are made of: not what is as it was before there was a choice, nor a choice that is idle."""
        values = self.model_dump(mode="json", exclude=set(exclude))
        if not self.tune_tokens:
            values.pop("tune_optimizer", None)
        return {key: value for key, value in values.items() if BEFORE.get(key) != value}

    @classmethod
    def of_identity(cls, identity: Mapping[str, Any]) -> FitSettings:
        """Return the settings that an id was made of; what it lacks is as it was before there was a choice."""
        return cls(**{**BEFORE, **identity})

    @field_validator("trellis_states")
    @classmethod
    def _known(cls, states: int) -> int:
        if states and states not in POLYNOMIALS:
            raise ValueError(
                f"a trellis of {states} states; there are {', '.join(map(str, POLYNOMIALS))}, and 0 for none"
            )
        return states

    @model_validator(mode="after")
    def _zeros_have_paths(self) -> FitSettings:
        if self.zeros and self.trellis_states and self.lane_rows == DIAGONALS:
            raise ValueError(
                "zeros needs columns that are paths of their own, and this trellis runs along diagonals; "
                "set lane_rows = 512 or trellis_states = 0 with it"
            )
        return self
