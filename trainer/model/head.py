"""Parts of the head beside its matrix: a bias of each token, and a low-rank step before a tied matrix.

A tied head must be the embedding. A residual of low rank between the last norm and the head, x + up(down x), lets it
differ without a second table. The bias holds what is true of a token in any context; it can begin at the tokens'
frequencies (`trainer.start.from_text`).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from trainer.model.parts import Part, Whole


class HeadSettings(Part):
    """Parts of the head."""

    output_bias: Literal["none", "zeros", "unigram"] = Field(
        "none", description="bias of each token's logit, and where it starts: zero, or the training text's frequencies"
    )
    head_residual_rank: int = Field(0, ge=0, description="rank of a learned residual before the head; 0 = none")


def check_head(settings: Whole) -> None:
    """Raise ValueError for a rank above the width."""
    if settings.head_residual_rank > settings.model_dim:
        raise ValueError(f"head_residual_rank {settings.head_residual_rank} exceeds model_dim {settings.model_dim}")


class HeadResidual(nn.Module):
    """x + up(down x)."""

    def __init__(self, config: Whole) -> None:
        super().__init__()
        self.down = nn.Linear(config.model_dim, config.head_residual_rank, bias=False)
        self.up = nn.Linear(config.head_residual_rank, config.model_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (…, model_dim) → the same
        return x + self.up(self.down(x))
