"""Pruning masks: the worked example, exact counts, and the orders they promise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pgolf_post.quantize.masks import magnitude_mask, ones_mask, wanda_mask


def random(seed: int, rows: int = 7, columns: int = 10) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def test_the_worked_example_of_the_docstring() -> None:
    symbols, error = torch.tensor([[1, 1]]), torch.tensor([[0.0, 0.4]])
    assert ones_mask(symbols, torch.ones(1, 1), error, None, 0.5).tolist() == [[True, False]]


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 1.0])
def test_magnitude_takes_exactly_its_share_of_the_smallest(share: float) -> None:
    weight = random(0)
    mask = magnitude_mask(weight, share)
    assert int(mask.sum()) == int(share * weight.numel())
    if mask.any() and not mask.all():
        assert weight[mask].abs().max() <= weight[~mask].abs().min()


def test_wanda_with_equal_inputs_is_magnitude_by_row_and_follows_the_inputs() -> None:
    weight = random(1)
    by_row = torch.cat([magnitude_mask(row[None], 0.3) for row in weight])
    assert torch.equal(wanda_mask(weight, torch.ones(10), 0.3), by_row)
    inputs = torch.ones(10)
    inputs[3] = 0.0
    assert wanda_mask(weight, inputs, 0.1)[:, 3].all()


def test_ones_zeroes_what_costs_least_and_only_ones() -> None:
    inputs = random(2, 40, 10).double()
    hessian, weight = inputs.mT @ inputs / 40, random(3)
    symbols = (weight / 0.8).round().int()
    error = weight - symbols * 0.8
    mask = ones_mask(symbols, torch.tensor([[0.8]]), error, hessian, 0.25)
    ones = symbols.abs() == 1
    assert int(mask.sum()) == int(0.25 * int(ones.sum()))
    assert not (mask & ~ones).any()

    def total(zeroed: Tensor) -> float:
        lost = (weight - symbols.masked_fill(zeroed, 0) * 0.8).double()
        return float(((lost @ hessian) * lost).sum())

    single = {
        tuple(at): total(torch.zeros_like(mask).index_put_(tuple(at[:, None]), torch.tensor(True)))
        for at in ones.nonzero()
    }
    chosen = [cost for at, cost in single.items() if mask[at[0], at[1]]]
    left = [cost for at, cost in single.items() if not mask[at[0], at[1]]]
    assert max(chosen) <= min(left) + 1e-9
