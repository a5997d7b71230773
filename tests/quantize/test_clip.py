"""Clip rules: what shares a scale, and which scale it is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pgolf_post.errors import NumericsError, SettingsError
from pgolf_post.quantize.clip import STEPS_BY_RULE, grid_steps, max_symbol, row_importance
from pgolf_post.quantize.rounding import spread_steps
from pgolf_post.quantize.rtn import round_to_nearest
from pgolf_post.rules import CLIP_RULES, GridRule, RtnRule


def weight_of(seed: int = 0) -> Tensor:
    return torch.randn(6, 8, generator=torch.Generator().manual_seed(seed))


def sdclip(weight: Tensor, bits: int, clip: float, lam: float = 0.0, diagonal: Tensor | None = None) -> Tensor:
    return grid_steps("w", weight, RtnRule(name="r", bits=bits, hessian_lambda=lam), clip, diagonal)


def restored(weight: Tensor, diagonal: Tensor | None = None, **settings: object) -> Tensor:
    rule = RtnRule(name="r", **settings)
    steps = spread_steps(grid_steps("w", weight, rule, rule.clip, diagonal), weight)
    return round_to_nearest(weight, steps, max_symbol(rule.bits)) * steps


def test_absmax_keeps_the_largest_weight_of_every_unit_on_the_outermost_symbol() -> None:
    weight = weight_of()
    for settings in ({"per": "row"}, {"per": "tensor"}, {"per": "group", "group_size": 4}):
        rule = RtnRule(name="r", bits=8, scale="absmax", **settings)
        steps = spread_steps(grid_steps("w", weight, rule, 0.0), weight)
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
    assert torch.equal(grid_steps("w", weight_of(), rule, 12.0), sdclip(weight_of(), 6, 12.0))
    far = weight_of()
    far[0, 0] = 1e3
    assert int(round_to_nearest(far, torch.full((6, 1), 0.5), max_symbol(0))[0, 0]) == 2000


def test_groups_that_do_not_divide_name_the_tensor_and_the_key() -> None:
    rule = RtnRule(name="r", per="group", group_size=3)
    with pytest.raises(NumericsError, match=r"mlp\.fc: its 8 columns do not divide into groups of 3"):
        grid_steps("mlp.fc", weight_of(), rule, 12.0)


def test_the_step_is_k_standard_deviations_over_the_largest_symbol() -> None:
    weight = weight_of(7)
    steps = sdclip(weight, 6, 12.85)
    torch.testing.assert_close(steps, 12.85 * weight.std(dim=1) / 31, rtol=1e-3, atol=0)
    assert torch.equal(steps, steps.half().float())


def test_lambda_zero_is_plain_sdclip_and_lambda_leans_on_important_rows() -> None:
    weight, diagonal = weight_of(8), torch.rand(8, generator=torch.Generator().manual_seed(8))
    plain = sdclip(weight, 6, 12.85)
    assert torch.equal(sdclip(weight, 6, 12.85, 0.0, diagonal), plain)
    importance = row_importance(weight, diagonal)
    assert float(importance.mean()) == pytest.approx(1.0)
    leaning = sdclip(weight, 6, 12.85, 0.4, diagonal)
    assert torch.equal(leaning > plain, importance > 1)


def test_a_row_that_lambda_would_lose_is_refused_by_name() -> None:
    """One huge row carries all importance, and would get a step at which nothing of it is left."""
    weight = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    weight[5] *= 1e5
    rule = RtnRule(name="embedding", bits=6, hessian_lambda=0.4)
    with pytest.raises(NumericsError, match=r"tok_emb\.weight: .*step of row 5 26\.2 times.*H is 64 times") as caught:
        grid_steps("tok_emb.weight", weight, rule, 12.85, torch.ones(8))
    assert "--set embedding.hessian_lambda=0" in str(caught.value.hint)
    # without λ, with little of it, or with less of a row, it is kept
    assert torch.isfinite(sdclip(weight, 6, 12.85, 0.0, torch.ones(8))).all()
    assert torch.isfinite(sdclip(weight, 6, 12.85, 0.05, torch.ones(8))).all()
    weight[5] *= 1e-4
    assert torch.isfinite(sdclip(weight, 6, 12.85, 0.4, torch.ones(8))).all()
    # a row that plain steps lose too is no matter of λ
    assert torch.isfinite(sdclip(weight, 6, 200.0, 0.4, torch.ones(8))).all()


def test_zero_and_constant_rows_have_usable_steps() -> None:
    weight = torch.stack((torch.zeros(8), torch.full((8,), 0.5), torch.randn(8)))
    steps = sdclip(weight, 6, 12.85)
    symbols = round_to_nearest(weight, steps, 31)
    assert symbols[0].tolist() == [0] * 8
    assert symbols[1].tolist() == [31] * 8
    assert float(symbols[1, 0] * steps[1]) == pytest.approx(0.5, rel=1e-3)


@pytest.mark.parametrize(("size", "named"), [(1e-13, 1), (1e13, 0)])
def test_steps_too_far_apart_name_the_tensor_and_row(size: float, named: int) -> None:
    weight = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    weight[1] *= size
    with pytest.raises(NumericsError, match=rf"tok_emb\.weight: the step of row {named}"):
        grid_steps("tok_emb.weight", weight, RtnRule(name="r", bits=6), 12.85)


def test_every_clip_rule_has_a_function_and_every_function_a_row() -> None:
    assert STEPS_BY_RULE.keys() == CLIP_RULES.keys()
    assert all(rule.source for rule in CLIP_RULES.values())
    assert all(set(rule.reads) <= GridRule.model_fields.keys() for rule in CLIP_RULES.values())


@pytest.mark.parametrize("scale", CLIP_RULES)
def test_a_rule_reads_of_the_hessian_what_its_row_says(scale: str) -> None:
    """Without a Hessian, a rule that needs one is that which stands in for it; others do not look."""
    weight, diagonal = weight_of(), torch.rand(8, generator=torch.Generator().manual_seed(1)) ** 4
    weight[0, 0] *= 8
    rule = RtnRule(name="r", bits=4, scale=scale)
    with_it = grid_steps("w", weight, rule, 6.0, diagonal)
    assert torch.equal(grid_steps("w", weight, rule.without_hessian(), 6.0), with_it) != CLIP_RULES[scale].needs_hessian


def test_a_clip_rule_that_there_is_not_is_an_error_listing_those_there_are() -> None:
    rule = RtnRule(name="r").model_copy(update={"scale": "percentil"})
    with pytest.raises(SettingsError, match="w: no such clip rule 'percentil'; valid: " + ", ".join(STEPS_BY_RULE)):
        grid_steps("w", weight_of(), rule, 12.0)
