"""The memory of the forward between calls, so that a text can be continued for the price of its new tokens.

Each visit of an attention leaves its keys and values here; the next call's queries see them too. Everything else in the
model looks back three tokens at most (the smear gate at its predecessor's trigram), for which the tokens are kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pgolf_post.errors import MismatchError

LOOK_BACK = 3  # tokens before a position that its embedding depends on


class Past:
    """Tokens, keys and values of up to `capacity` positions."""

    def __init__(self, batch: int, capacity: int, device: torch.device) -> None:
        self.capacity, self.length, self.visit = capacity, 0, 0
        self.tokens = torch.zeros(batch, capacity, dtype=torch.int64, device=device)
        self.visits: list[tuple[Tensor, Tensor]] = []  # of each visit, (batch, kv_heads, capacity, head_dim)

    def read(self, tokens: Tensor) -> Tensor:  # (batch, new) → (batch, length): all tokens so far
        """Begin a forward pass over new tokens. Raises MismatchError beyond the capacity."""
        new = tokens.size(1)
        if self.length + new > self.capacity:
            raise MismatchError(f"a past of {self.capacity} tokens holds {self.length}; {new} more do not fit")
        self.tokens[:, self.length : self.length + new] = tokens
        self.length, self.visit = self.length + new, 0
        return self.tokens[:, : self.length]

    def extend(
        self,
        k: Tensor,  # (batch, kv_heads, new, head_dim)
        v: Tensor,
    ) -> tuple[Tensor, Tensor]:  # each (batch, kv_heads, length, head_dim)
        """Add one visit's keys and values. Return all that it has had."""
        if self.visit == len(self.visits):
            shape = (*k.shape[:2], self.capacity, k.size(-1))
            self.visits.append((k.new_zeros(shape), v.new_zeros(shape)))
        held = self.visits[self.visit]
        self.visit += 1
        for buffer, new in zip(held, (k, v), strict=True):
            buffer[:, :, self.length - k.size(2) : self.length] = new
        return held[0][:, :, : self.length], held[1][:, :, : self.length]

    def mask(self, new: int, document: Tensor | None) -> Tensor:  # document: (batch, length)
        """Return the positions that the `new` last ones may see, (batch or 1, 1, new, length) bool."""
        causal = torch.ones(self.length, self.length, dtype=torch.bool, device=self.tokens.device).tril()[-new:]
        if document is None:
            return causal[None, None]
        return (causal & (document[:, -new:, None] == document[:, None, :]))[:, None]
