"""Clip rules: what shares a scale, and which scale it is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pgolf_post.errors import NumericsError
from pgolf_post.plan import RtnRule
from pgolf_post.quantize.clip import grid_scales, max_symbol, sdclip_scales
from pgolf_post.quantize.rows import spread_scales
from pgolf_post.quantize.rtn import round_to_nearest


def weight_of(seed: int = 0) -> Tensor:
    return torch.randn(6, 8, generator=torch.Generator().manual_seed(seed))


def restored(weight: Tensor, diagonal: Tensor | None = None, **settings: object) -> Tensor:
    rule = RtnRule(name="r", **settings)
    steps = spread_scales(grid_scales("w", weight, rule, rule.clip, diagonal), weight)
    return round_to_nearest(weight, steps, max_symbol(rule.bits)) * steps


def test_a_row_rule_is_plain_sdclip() -> None:
    rule = RtnRule(name="r", bits=6, clip=12.0)
    assert torch.equal(grid_scales("w", weight_of(), rule, 12.0), sdclip_scales("w", weight_of(), 6, 12.0))


def test_absmax_keeps_the_largest_weight_of_every_unit_on_the_outermost_symbol() -> None:
    weight = weight_of()
    for settings in ({"per": "row"}, {"per": "tensor"}, {"per": "group", "group_size": 4}):
        rule = RtnRule(name="r", bits=8, scale="absmax", **settings)
        steps = spread_scales(grid_scales("w", weight, rule, 0.0), weight)
        assert int(round_to_nearest(weight, steps, 200).abs().max()) == 127


def test_a_group_of_all_columns_is_a_row_and_of_all_values_the_tensor() -> None:
    weight = weight_of()
    by_row = restored(weight, bits=4, clip=6.0)
    assert torch.equal(restored(weight, bits=4, clip=6.0, per="group", group_size=8), by_row)
    one_row = weight.reshape(1, -1)
    assert torch.equal(restored(weight, bits=4, clip=6.0, per="tensor"), restored(one_row, bits=4, clip=6.0).view(6, 8))


def test_finer_groups_come_closer() -> None:
    weight = weight_of() * torch.tensor([1.0, 10.0]).repeat_interleave(4)
    errors = [
        float((weight - restored(weight, bits=4, scale="absmax", per=per, group_size=size)).norm())
        for per, size in (("tensor", 0), ("row", 0), ("group", 4))
    ]
    assert errors[2] < errors[1] <= errors[0]


def test_percentile_is_never_worse_than_absmax_in_its_own_measure() -> None:
    for seed in range(20):
        weight, diagonal = weight_of(seed), torch.rand(8, generator=torch.Generator().manual_seed(seed)) ** 4
        weight[0, 0] *= 8
        plain = (weight - restored(weight, bits=4, scale="absmax")).square()
        searched = (weight - restored(weight, bits=4, scale="percentile")).square()
        weighted = (weight - restored(weight, diagonal, bits=4, scale="percentile-hessian")).square()
        assert (searched.sum(1) <= plain.sum(1) + 1e-6).all()
        assert ((weighted * diagonal).sum(1) <= (searched * diagonal).sum(1) + 1e-6).all()


def test_unbounded_symbols_have_the_step_of_six_bits() -> None:
    rule = RtnRule(name="r", bits=0, clip=12.0)
    assert torch.equal(grid_scales("w", weight_of(), rule, 12.0), sdclip_scales("w", weight_of(), 6, 12.0))
    far = weight_of()
    far[0, 0] = 1e3
    assert int(round_to_nearest(far, torch.full((6, 1), 0.5), max_symbol(0))[0, 0]) == 2000


def test_groups_that_do_not_divide_name_the_tensor_and_the_key() -> None:
    rule = RtnRule(name="r", per="group", group_size=3)
    with pytest.raises(NumericsError, match=r"mlp\.fc: its 8 columns do not divide into groups of 3"):
        grid_scales("mlp.fc", weight_of(), rule, 12.0)
