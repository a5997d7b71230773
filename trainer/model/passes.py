"""Passes of a loop with parameters of their own: an embedding, a norm, a scale and shift (FiLM) of the residual stream.

A block that is visited again cannot tell which visit it is in. Scripts tell it: by a learned vector that is added to
the stream where a pass begins (`loop_pass_emb`, openai/parameter-golf, SP8192 with wider loops), by normalising the
stream there again, or by scaling and shifting its channels (FiLM, Perez et al. 2018). All start as the identity or, the
norm, without a gain, and act only while loops are active. A pass begins at each visit of the lowest looped layer.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from trainer.model.norms import rms_norm
from trainer.model.parts import Part, Whole
from trainer.model.visits import looped_layers, revisit_in_lanes, revisits

Where = Literal["none", "pass", "visit"]


class PassSettings(Part):
    """Parameters that passes, or visits of looped layers, have of their own."""

    pass_embeddings: Where = Field(
        "none", description="a learned vector is added to the stream where a pass begins, or at each looped visit"
    )
    pass_embedding_rank: int | None = Field(
        None, ge=1, description="rank of the table of pass_embeddings; default full"
    )
    pass_norm: bool = Field(False, description="the stream is normalised where a further pass begins, with a gain each")
    pass_film: Where = Field(
        "none", description="the stream's channels are scaled and shifted where a pass begins, or at each looped visit"
    )


def has_passes(config: Whole) -> bool:
    """Return whether a model's passes have anything of their own."""
    return config.pass_norm or config.pass_embeddings != "none" or config.pass_film != "none"


def check_passes(settings: Whole) -> None:
    """Raise ValueError where a setting of passes could not act."""
    if settings.pass_embedding_rank is not None and settings.pass_embeddings == "none":
        raise ValueError(f"pass_embedding_rank {settings.pass_embedding_rank} does nothing with pass_embeddings 'none'")
    if not has_passes(settings):
        return
    if not looped_layers(settings):
        raise ValueError("pass_embeddings, pass_norm and pass_film need a layer that is visited twice")
    rows = num_rows(settings, settings.pass_embeddings)
    if settings.pass_embedding_rank is not None and settings.pass_embedding_rank > min(rows, settings.model_dim):
        raise ValueError(
            f"pass_embedding_rank {settings.pass_embedding_rank} exceeds that of its table, "
            f"{rows} rows of {settings.model_dim}"
        )
    if (layer := revisit_in_lanes(settings)) is not None:
        raise ValueError(f"passes have one residual stream, but layer {layer} is re-visited after lanes split")


def first_rows(config: Whole, where: Where) -> dict[int, int]:
    """Return layer → row of its first visit in a table; a row follows for each re-visit."""
    if where == "pass":
        return {looped_layers(config)[0]: 0}
    rows, start = {}, 0
    for layer, count in revisits(config).items():
        rows[layer] = start
        start += count + 1
    return rows


def num_rows(config: Whole, where: Where) -> int:
    """Return the rows of a table: as many as there are passes, or visits of looped layers."""
    counts = [count + 1 for count in revisits(config).values()]
    return counts[0] if where == "pass" else sum(counts)


class Passes(nn.Module):
    """The parameters of passes, and what they do to the stream before a visit."""

    def __init__(self, config: Whole) -> None:
        super().__init__()
        self.config, dim = config, config.model_dim
        if config.pass_embeddings != "none":
            rows, rank = num_rows(config, config.pass_embeddings), config.pass_embedding_rank
            if rank is None:
                self.embed = nn.Parameter(torch.zeros(rows, dim))
            else:
                self.code = nn.Parameter(torch.zeros(rows, rank))
                self.basis = nn.Parameter(torch.zeros(rank, dim))  # orthogonal at the start
        if config.pass_norm:
            self.gain = nn.Parameter(torch.ones(num_rows(config, "pass") - 1, dim))
        if config.pass_film != "none":
            self.film = nn.Parameter(torch.zeros(2, num_rows(config, config.pass_film), dim))  # scale - 1, shift

    def forward(
        self,
        x: Tensor,  # (batch, seq_len, model_dim)
        layer: int,
        revisit: int,  # 0 = the layer's first visit
    ) -> Tensor:  # (batch, seq_len, model_dim)
        """Return the stream that a visit enters with: normalised, scaled and shifted, with its vector added."""
        config = self.config
        if config.pass_norm and revisit and layer in first_rows(config, "pass"):
            x = self.gain[revisit - 1] * rms_norm(x)
        if config.pass_film != "none" and layer in first_rows(config, config.pass_film):
            row = first_rows(config, config.pass_film)[layer] + revisit
            x = (1 + self.film[0, row]) * x + self.film[1, row]
        if config.pass_embeddings != "none" and layer in first_rows(config, config.pass_embeddings):
            row = first_rows(config, config.pass_embeddings)[layer] + revisit
            x = x + (self.embed[row] if config.pass_embedding_rank is None else self.code[row] @ self.basis)
        return x
