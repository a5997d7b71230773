"""Kinds of tokens, which a model may know: the class that a reader would give each, and whether it begins with a space.

The tokenizer decides them, as it decides the size of the vocabulary, so they stand in a checkpoint's config.json:
`token_kinds` has one hexadecimal digit for each token, its place among the classes of `pgolf-post score --breakdown`,
plus 8 if the token begins with a space. Scripts call such a token the start of a word.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from trainer.model.parts import Part, Whole

NUM_CLASSES = 8
SPACE = 8  # added to the class of a token that begins with a space


class TokenKindSettings(Part):
    """The kinds of tokens, as the tokenizer has them."""

    token_kinds: str | None = Field(
        None, pattern=r"^[0-9a-f]*$", description="one hexadecimal digit per token: its class, plus 8 after a space"
    )


class TokenTypeSettings(Part):
    """An embedding of a token's class."""

    token_type_dim: int = Field(
        0, ge=0, description="width of the table that embeds a token's class (word start, digits, …); 0 = none"
    )


def reads_token_kinds(config: Whole) -> bool:
    """Return whether a model computes with the kinds of tokens."""
    return bool(config.token_type_dim or config.word_start_boost or config.bigram_classes != "none")


def check_token_kinds(config: Whole) -> None:
    """Raise ValueError if a model that reads the kinds lacks them, or has those of another vocabulary."""
    if not reads_token_kinds(config):
        if config.token_kinds is not None:
            raise ValueError("token_kinds is read by bigram_classes, word_start_boost and token_type_dim only")
        return
    if config.token_kinds is None:
        raise ValueError("bigram_classes, word_start_boost and token_type_dim need token_kinds, from the tokenizer")
    if len(config.token_kinds) != config.vocab_size:
        raise ValueError(f"token_kinds has {len(config.token_kinds)} digits, vocab_size is {config.vocab_size}")


class TokenKinds(nn.Module):
    """The kinds as a table, which is computed from the config and never saved."""

    table: Tensor  # (vocab_size,) int64

    def __init__(self, config: Whole) -> None:
        super().__init__()
        kinds = torch.tensor([int(digit, 16) for digit in config.token_kinds or ""], device="cpu")
        self.register_buffer("table", kinds, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:  # (batch, seq_len) → the same, int64
        """Return the kind of each token."""
        return self.table.to(tokens.device)[tokens]


class TokenTypeEmbedding(nn.Module):
    """An addition to the token embedding: scale · proj(table[class])."""

    def __init__(self, config: Whole) -> None:
        super().__init__()
        self.embed = nn.Embedding(NUM_CLASSES, config.token_type_dim)
        self.proj = nn.Linear(config.token_type_dim, config.embedding_dim or config.model_dim, bias=False)
        self.scale = nn.Parameter(torch.tensor(0.05))

    def forward(self, kinds: Tensor) -> Tensor:  # (batch, seq_len) → (batch, seq_len, embedding_dim)
        projected: Tensor = self.proj(self.embed(kinds % SPACE))
        return self.scale * projected
