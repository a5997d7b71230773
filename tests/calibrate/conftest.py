"""Toy and pico models for the calibration laws."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgolf_post.calibrate import CalibrationSettings
from pgolf_post.families import Lookup, Site

SETTINGS = CalibrationSettings(tokens=320)

TOY_SITES = [
    Site("linear.in", "linear", ("linear.weight",)),
    Site("head.in", "head_in", ("embedding.weight",), outputs=("head_out",), is_head=True),
]
TOY_LOOKUPS = [Lookup("embedding.weight", "embedding")]


class Toy(nn.Module):
    """Tied embedding, a causal mean, one linear layer visited `visits` times, tanh between, a soft-capped head."""

    def __init__(self, visits: int, vocab: int = 10, dim: int = 4, cap: float = 3.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(vocab, dim)
        self.linear = nn.Linear(dim, dim, bias=False)
        self.head_in, self.head_out = nn.Identity(), nn.Identity()
        self.visits, self.cap = visits, cap

    def hidden(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = x.cumsum(1) / torch.arange(1, x.size(1) + 1, dtype=x.dtype)[:, None]
        for _ in range(self.visits):
            x = x + torch.tanh(self.linear(x))
        return self.head_in(x)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.cap * torch.tanh(self.head_out(F.linear(hidden, self.embedding.weight)) / self.cap)


@pytest.fixture(params=[1, 3])
def toy(request: pytest.FixtureRequest) -> Toy:
    return Toy(request.param).requires_grad_(False)
