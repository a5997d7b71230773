"""Embeddings beside the token embedding: hashed bigrams and trigrams, and tokens added to attention's values.

A bigram table gives the model the previous token for free: (t_{i-1}, t_i) is hashed into one of V_b - 1 buckets; the
last bucket stands for positions with too short a past. Trigrams are looked up in the same table and added. One early
script (#65) hashes by a product instead, with token 0 before the first, and adds the table's rows unscaled. A value
embedding puts the token's identity back into the values of chosen layers, through one shared table.
Source of hash and forms: the public scripts of openai/parameter-golf.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.architecture import ModelConfig

MULTIPLIERS = (36313, 27191, 51497)  # of the token itself, its predecessor, and the one before
FACTOR = 92821  # of the predecessor, in the hash by a product


def ngram_hash(
    tokens: Tensor,  # (batch, seq_len)
    n: int,  # 2 = bigram, 3 = trigram
    buckets: int,
) -> Tensor:  # (batch, seq_len) int64
    """Return (36313·t_i xor 27191·t_{i-1} [xor 51497·t_{i-2}]) mod (buckets - 1); buckets - 1 at the first n - 1."""
    tokens = tokens.long()
    seq_len = tokens.size(1)
    hashed = torch.full_like(tokens, buckets - 1)
    if seq_len < n:
        return hashed
    mixed = MULTIPLIERS[0] * tokens[:, n - 1 :]
    for back in range(1, n):
        mixed = mixed ^ (MULTIPLIERS[back] * tokens[:, n - 1 - back : seq_len - back])
    hashed[:, n - 1 :] = mixed % (buckets - 1)
    return hashed


def product_hash(tokens: Tensor, buckets: int) -> Tensor:  # (batch, seq_len) → the same, int64
    """Return (92821·t_{i-1} + t_i) mod buckets, with t_{-1} = 0."""
    tokens = tokens.long()
    return (FACTOR * F.pad(tokens[:, :-1], (1, 0)) + tokens) % buckets


class NgramEmbedding(nn.Module):
    """An addition to the token embedding: scale · proj(table[bigram] (+ table[trigram]))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        embedding_dim = config.embedding_dim or config.model_dim
        dim = config.bigram_dim or embedding_dim
        self.embed = nn.Embedding(config.bigram_buckets, dim)
        if dim != embedding_dim or config.bigram_hash == "product":
            self.proj = nn.Linear(dim, embedding_dim, bias=False)
        if config.bigram_hash == "xor":
            self.scale = nn.Parameter(torch.tensor(0.05))

    def forward(self, tokens: Tensor) -> Tensor:  # (batch, seq_len) → (batch, seq_len, embedding_dim)
        if self.config.bigram_hash == "product":
            projected: Tensor = self.proj(self.embed(product_hash(tokens, self.config.bigram_buckets)))
            return projected
        x = self.embed(ngram_hash(tokens, 2, self.config.bigram_buckets))
        if self.config.trigram:
            x = x + self.embed(ngram_hash(tokens, 3, self.config.bigram_buckets))
        return self.scale * (self.proj(x) if hasattr(self, "proj") else x)


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
