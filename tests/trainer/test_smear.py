"""The smear gates by hand: two channels, a few tokens, shares that are powers of two."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from trainer.model.smear import channel_smear, narrow_smear

X = torch.tensor([[[1.0, 2.0], [3.0, -4.0], [5.0, 8.0]]], dtype=torch.float64)
TOKENS = torch.tensor([[7, 1, 9]])  # a document begins in the middle
LN3 = math.log(3)  # σ(ln 3) = 3/4, σ(-ln 3) = 1/4


def narrow(across_bos: bool) -> Tensor:
    gate = torch.tensor([[LN3 / 3]], dtype=torch.float64)  # of the first channel: 3 → 3/4, 5 → σ(5/3 · ln 3)
    return narrow_smear(X, TOKENS, gate, torch.tensor([2.0], dtype=torch.float64), across_bos)


def test_the_narrow_gate_stops_at_bos_or_does_not() -> None:
    last = 2 / (1 + 3 ** (-5 / 3))
    expected = X.clone()
    expected[0, 2] += last * X[0, 1]
    torch.testing.assert_close(narrow(across_bos=False), expected, rtol=0, atol=1e-12)
    expected[0, 1] += 2 * 0.75 * X[0, 0]
    torch.testing.assert_close(narrow(across_bos=True), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("of_predecessor", [True, False])
def test_channels_are_blended_with_what_stood_before(of_predecessor: bool) -> None:
    logits = torch.tensor([LN3, -LN3], dtype=torch.float64)
    shares = (0.25, 0.75) if of_predecessor else (0.75, 0.25)  # of the token itself, in each channel
    expected = [[shares[0] * 1, shares[1] * 2]]
    for own, before in (((3, -4), (1, 2)), ((5, 8), (3, -4))):
        expected.append([s * a + (1 - s) * b for s, a, b in zip(shares, own, before, strict=True)])
    found = channel_smear(X, logits, of_predecessor)
    torch.testing.assert_close(found[0], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)
