"""The value embedding: tokens added to attention's values.

It puts the token's identity back into the values of chosen layers, through one shared table. Source of the form: the
public scripts of openai/parameter-golf.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer.model.architecture import ModelConfig


class ValueEmbedding(nn.Module):
    """An addition to the values of the listed layers: layer_scale · scale · proj(table[token])."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layers = config.value_embed_layers
        kv_dim = config.num_kv_heads * (config.model_dim // config.num_heads)
        self.embed = nn.Embedding(config.vocab_size, config.value_embed_dim)
        if config.value_embed_dim != kv_dim:
            self.proj = nn.Linear(config.value_embed_dim, kv_dim, bias=False)
        self.scale = nn.Parameter(torch.tensor(0.1))
        self.layer_scales = nn.Parameter(torch.ones(len(self.layers)))

    def forward(self, tokens: Tensor) -> dict[int, Tensor]:  # (batch, seq_len) → layer: (batch, seq_len, kv_dim)
        x = self.embed(tokens)
        x = self.scale * (self.proj(x) if hasattr(self, "proj") else x)
        return {layer: self.layer_scales[i] * x for i, layer in enumerate(self.layers)}
