"""The gains of a visit: what scales a block's parts, apart from its matrices.

In every script but one a block has them, on each of its visits the same. In #1204 each place in the list of visits has
its own, while the matrices are the layer's: its two visits of layer 4 differ, and before the loops are on, place 6 is
layer 6 with the gains that will later be those of a re-visit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from trainer.model.architecture import ModelConfig
from trainer.model.layers import has_xsa, query_gains
from trainer.model.visits import num_places


class Controls(NamedTuple):
    """The gains that one visit applies."""

    attn_scale: Tensor  # (model_dim,)
    mlp_scale: Tensor  # (model_dim,)
    resid_mix: Tensor  # (2, model_dim): of the stream, of the embedding
    q_gain: Tensor  # (num_heads,)
    norm_scale: float
    use_xsa: bool
    place: int  # whose value embedding is added: a layer, or a place in the list of visits


def norm_scale(config: ModelConfig, place: int) -> float:
    """Return the factor of a block's normalised inputs."""
    return float((place + 1) ** -0.5) if config.ln_scale else 1.0


class Place(nn.Module):
    """The gains of a place beyond the number of layers."""

    def __init__(self, config: ModelConfig, layer: int) -> None:  # layer: which the place visits
        super().__init__()
        dim = config.model_dim
        self.attn_scale = nn.Parameter(torch.ones(dim))
        self.mlp_scale = nn.Parameter(torch.ones(dim))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(dim), torch.zeros(dim))))
        self.q_gain = nn.Parameter(torch.tensor(query_gains(config)[layer]))

    def controls(self, config: ModelConfig, place: int) -> Controls:
        """Return the gains of a visit at this place."""
        use_xsa = has_xsa(config, place, num_places(config))
        return Controls(
            self.attn_scale, self.mlp_scale, self.resid_mix, self.q_gain, norm_scale(config, place), use_xsa, place
        )
