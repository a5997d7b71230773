"""Hashed n-grams: a table of vectors that the last two or three tokens look up, added to the token embedding.

A bigram table gives the model the previous token for free: (t_{i-1}, t_i) is hashed into one of V_b - 1 buckets; the
last bucket stands for positions with too short a past. Trigrams are looked up in the same table and added, or in a
table of their own. Buckets can be split by what the token is, so that pairs that begin a word never meet those inside
one (`pos_conditional_bigram`); several hashes of one pair, averaged, make collisions rarer; a gate or a boost weighs
the table by context. One early script (#65) hashes by a product instead, with token 0 before the first, and adds the
table's rows unscaled. Source of hash and forms: the public scripts of openai/parameter-golf.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from trainer.model.parts import Part, Whole
from trainer.model.token_kinds import SPACE

HEADS = (  # multipliers of the token itself, its predecessor, and the one before: one row for each hash
    (36313, 27191, 51497),
    (48611, 60493, 40289),
    (57041, 33317, 45007),
    (39019, 53777, 62233),
)
FACTOR = 92821  # of the predecessor, in the hash by a product
CLASSES = {"none": 1, "word_start": 2, "word_position": 3}


class NgramSettings(Part):
    """Forms of the n-gram tables."""

    bigram_classes: Literal["none", "word_start", "word_position"] = Field(
        "none",
        description="split the buckets by whether a token begins a word; or is its first, its second or a later one",
    )
    bigram_heads: int = Field(1, ge=1, le=len(HEADS), description="hashes of each n-gram, whose rows are averaged")
    bigram_gate: bool = Field(False, description="weigh the n-grams at each position by a sigmoid of its embedding")
    word_start_boost: bool = Field(
        False, description="weigh the n-grams of tokens that begin a word by a learned number"
    )
    trigram_buckets: int = Field(0, ge=0, description="rows of a hashed trigram table of its own; 0 = none")
    trigram_dim: int | None = Field(None, ge=1, description="width of that table; default that of the embedding")


def check_ngrams(settings: Whole) -> None:
    """Raise ValueError where a form of the n-gram tables could not act."""
    forms = ("bigram_classes", "bigram_heads", "bigram_gate", "word_start_boost")
    changed = [key for key in forms if getattr(settings, key) != NgramSettings.model_fields[key].default]
    if changed and (not settings.bigram_buckets or settings.bigram_hash == "product"):
        raise ValueError(f"{changed[0]} needs a bigram table with bigram_hash 'xor': set bigram_buckets")
    if settings.trigram_dim is not None and not settings.trigram_buckets:
        raise ValueError(f"trigram_dim {settings.trigram_dim} does nothing with trigram_buckets 0")
    if settings.trigram and settings.trigram_buckets:
        raise ValueError("trigram looks trigrams up in the bigram table, trigram_buckets in one of their own; set one")
    least = CLASSES[settings.bigram_classes] + 1
    for key in ("bigram_buckets", "trigram_buckets"):
        buckets = getattr(settings, key)
        if buckets and buckets < least and settings.bigram_hash == "xor":
            raise ValueError(
                f"{key} {buckets} leaves no bucket to hash into: the last one stands for no predecessor"
                if least == 2
                else f"{key} {buckets} is too few for bigram_classes {settings.bigram_classes!r}: at least {least}"
            )


def ngram_hash(
    tokens: Tensor,  # (batch, seq_len)
    n: int,  # 2 = bigram, 3 = trigram
    buckets: int,
    head: int = 0,  # row of HEADS
) -> Tensor:  # (batch, seq_len) int64
    """Return (36313·t_i xor 27191·t_{i-1} [xor 51497·t_{i-2}]) mod (buckets - 1); buckets - 1 at the first n - 1."""
    hashed, mixed = _mixed(tokens, n, buckets, head)
    if mixed is not None:
        hashed[:, n - 1 :] = mixed % (buckets - 1)
    return hashed


def class_hash(
    tokens: Tensor,  # (batch, seq_len)
    n: int,
    buckets: int,
    head: int,
    classes: Tensor,  # (batch, seq_len) int64, of each token
    num_classes: int,
) -> Tensor:  # (batch, seq_len) int64
    """Return the hash within the share of the buckets that the token's class has; buckets - 1 at the first n - 1."""
    hashed, mixed = _mixed(tokens, n, buckets, head)
    share = (buckets - 1) // num_classes
    if mixed is not None:
        hashed[:, n - 1 :] = classes[:, n - 1 :] * share + mixed % share
    return hashed


def _mixed(tokens: Tensor, n: int, buckets: int, head: int) -> tuple[Tensor, Tensor | None]:
    """Return the last bucket at every position, and the mixed n-gram of each position that has one."""
    tokens = tokens.long()
    seq_len = tokens.size(1)
    nowhere = torch.full_like(tokens, buckets - 1)
    if seq_len < n:
        return nowhere, None
    mixed = HEADS[head][0] * tokens[:, n - 1 :]
    for back in range(1, n):
        mixed = mixed ^ (HEADS[head][back] * tokens[:, n - 1 - back : seq_len - back])
    return nowhere, mixed


def product_hash(tokens: Tensor, buckets: int) -> Tensor:  # (batch, seq_len) → the same, int64
    """Return (92821·t_{i-1} + t_i) mod buckets, with t_{-1} = 0."""
    tokens = tokens.long()
    return (FACTOR * F.pad(tokens[:, :-1], (1, 0)) + tokens) % buckets


def token_classes(kinds: Tensor, split: str) -> Tensor:  # (batch, seq_len) → the same, int64
    """Return the class of each token: 0 where a word begins; else 1, or its place in the word up to 2."""
    inside = (kinds < SPACE).long()
    if split == "word_start":
        return inside
    return inside * (1 + F.pad(inside[:, :-1], (1, 0)))


class NgramEmbedding(nn.Module):
    """An addition to the token embedding: weight · scale · proj(table[bigram] (+ table[trigram]))."""

    def __init__(self, config: Whole) -> None:
        super().__init__()
        self.config = config
        embedding_dim = config.embedding_dim or config.model_dim
        dim = config.bigram_dim or embedding_dim
        self.embed = nn.Embedding(config.bigram_buckets, dim)
        if dim != embedding_dim or config.bigram_hash == "product":
            self.proj = nn.Linear(dim, embedding_dim, bias=False)
        if config.bigram_hash == "xor":
            self.scale = nn.Parameter(torch.tensor(0.05))
        if config.bigram_gate:
            self.gate = nn.Parameter(torch.zeros(embedding_dim))
            self.gate_bias = nn.Parameter(torch.tensor(0.0))
        if config.word_start_boost:
            self.boost = nn.Parameter(torch.tensor(1.0))

    def forward(
        self,
        tokens: Tensor,  # (batch, seq_len)
        embedded: Tensor,  # (batch, seq_len, embedding_dim), of the tokens alone
        kinds: Tensor | None,  # (batch, seq_len), where the model reads them
    ) -> Tensor:  # (batch, seq_len, embedding_dim)
        if self.config.bigram_hash == "product":
            projected: Tensor = self.proj(self.embed(product_hash(tokens, self.config.bigram_buckets)))
            return projected
        x = self._looked_up(tokens, 2, kinds)
        if self.config.trigram:
            x = x + self._looked_up(tokens, 3, kinds)
        x = self.scale * (self.proj(x) if hasattr(self, "proj") else x)
        if self.config.bigram_gate:
            x = torch.sigmoid(embedded @ self.gate + self.gate_bias).unsqueeze(-1) * x
        if self.config.word_start_boost:
            assert kinds is not None
            x = torch.where(kinds >= SPACE, self.boost, 1.0).unsqueeze(-1) * x
        return x

    def _looked_up(self, tokens: Tensor, n: int, kinds: Tensor | None) -> Tensor:  # (batch, seq_len, bigram_dim)
        """Return the mean of the rows that the hashes of each position's n-gram have."""
        rows: Tensor = self.embed(self._hash(tokens, n, 0, kinds))
        for head in range(1, self.config.bigram_heads):
            rows = rows + self.embed(self._hash(tokens, n, head, kinds))
        return rows / self.config.bigram_heads if self.config.bigram_heads > 1 else rows

    def _hash(self, tokens: Tensor, n: int, head: int, kinds: Tensor | None) -> Tensor:  # (batch, seq_len) int64
        buckets, split = self.config.bigram_buckets, self.config.bigram_classes
        if split == "none":
            return ngram_hash(tokens, n, buckets, head)
        assert kinds is not None
        return class_hash(tokens, n, buckets, head, token_classes(kinds, split), CLASSES[split])


class TrigramEmbedding(nn.Module):
    """An addition to the token embedding: scale · proj(table[trigram])."""

    def __init__(self, config: Whole) -> None:
        super().__init__()
        embedding_dim = config.embedding_dim or config.model_dim
        dim = config.trigram_dim or embedding_dim
        self.buckets = config.trigram_buckets
        self.embed = nn.Embedding(config.trigram_buckets, dim)
        if dim != embedding_dim:
            self.proj = nn.Linear(dim, embedding_dim, bias=False)
        self.scale = nn.Parameter(torch.tensor(0.05))

    def forward(self, tokens: Tensor) -> Tensor:  # (batch, seq_len) → (batch, seq_len, embedding_dim)
        x = self.embed(ngram_hash(tokens, 3, self.buckets))
        return self.scale * (self.proj(x) if hasattr(self, "proj") else x)
