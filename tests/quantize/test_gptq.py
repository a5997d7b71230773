"""GPTQ laws: the worked example, H = I is rounding to nearest, never worse than rounding in its own measure."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pgolf_post.errors import NumericsError
from pgolf_post.quantize.clip import max_symbol, row_importance, sdclip_scales
from pgolf_post.quantize.gptq import factorize, gptq, hessian_error
from pgolf_post.quantize.rtn import round_to_nearest


def problem(seed: int, rows: int = 12, width: int = 20, tokens: int = 64) -> tuple[Tensor, Tensor]:
    """A random matrix and the Hessian of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator)
    inputs = (torch.randn(tokens, width, generator=generator) @ mixing).double()
    return torch.randn(rows, width, generator=generator), inputs.mT @ inputs / tokens


def quantized(weight: Tensor, hessian: Tensor, scales: Tensor, act_order: bool = True, block: int = 8) -> Tensor:
    return gptq(weight, factorize("w", hessian, 0.01, act_order), scales, 31, block)


def test_the_worked_example_of_the_docstring() -> None:
    hessian = torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=torch.float64)
    weight, scales = torch.tensor([[0.6, 0.6]]), torch.ones(1)
    factor = factorize("w", hessian, 1e-9, act_order=False)
    symbols = gptq(weight, factor, scales, 31)
    assert symbols.tolist() == [[1, 0]]
    nearest = round_to_nearest(weight, scales, 31)
    assert nearest.tolist() == [[1, 1]]
    energy = float((weight.double() @ hessian @ weight.double().mT).item())
    assert hessian_error(weight, nearest.float(), hessian) * energy == pytest.approx(0.608, abs=1e-6)
    assert hessian_error(weight, symbols.float(), hessian) * energy == pytest.approx(0.088, abs=1e-6)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("block", [1, 7, 128])
def test_identity_hessian_is_round_to_nearest(act_order: bool, block: int) -> None:
    weight, _ = problem(0)
    scales = sdclip_scales("w", weight, 6, 8.0)
    symbols = quantized(weight, torch.eye(20, dtype=torch.float64), scales, act_order, block)
    assert torch.equal(symbols, round_to_nearest(weight, scales, 31))


def test_error_is_at_most_that_of_rounding_on_200_problems() -> None:
    worse, ratios = 0, []
    for seed in range(200):
        weight, hessian = problem(seed)
        scales = sdclip_scales("w", weight, 4, 6.0)
        errors = [
            hessian_error(weight, symbols * scales[:, None], hessian)
            for symbols in (quantized(weight, hessian, scales), round_to_nearest(weight, scales, 31))
        ]
        worse += errors[0] > errors[1]
        ratios.append(errors[0] / errors[1])
    assert worse == 0
    assert sum(ratios) / len(ratios) < 0.6


@pytest.mark.parametrize("block", [1, 3, 20, 64])
def test_block_size_changes_nothing(block: int) -> None:
    weight, hessian = problem(1)
    scales = sdclip_scales("w", weight, 6, 8.0)
    assert torch.equal(quantized(weight, hessian, scales, block=block), quantized(weight, hessian, scales, block=20))


def test_permuting_inputs_permutes_the_symbols() -> None:
    weight, hessian = problem(2)
    scales = sdclip_scales("w", weight, 6, 8.0)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    permuted = quantized(weight[:, order], hessian[order][:, order], scales)
    assert torch.equal(permuted, quantized(weight, hessian, scales)[:, order])


def test_inputs_are_left_bit_identical() -> None:
    weight, hessian = problem(3)
    kept = weight.clone(), hessian.clone()
    quantized(weight, hessian, sdclip_scales("w", weight, 6, 8.0, 0.4, hessian.diagonal()))
    assert torch.equal(weight, kept[0])
    assert torch.equal(hessian, kept[1])


def test_thread_count_changes_no_symbol() -> None:
    weight, hessian = problem(4, rows=40, width=200, tokens=400)
    scales = sdclip_scales("w", weight, 6, 8.0)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(quantized(weight, hessian, scales, block=64))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])


def test_dead_columns_are_rounded_to_nearest() -> None:
    weight, hessian = problem(5)
    hessian[:, 4] = 0
    hessian[4, :] = 0
    scales = sdclip_scales("w", weight, 6, 8.0)
    factor = factorize("w", hessian, 0.01, act_order=True)
    assert factor.dead_columns == 1
    symbols = gptq(weight, factor, scales, 31)
    assert torch.equal(symbols[:, 4], round_to_nearest(weight, scales, 31)[:, 4])


def test_rank_deficient_hessian_is_damped_and_says_so() -> None:
    vector = torch.randn(16, 1, generator=torch.Generator().manual_seed(6)).double()
    factor = factorize("w", vector @ vector.mT, 1e-20, act_order=False)
    assert factor.damp > 1e-20


def test_hessian_that_no_damping_mends_is_an_error_naming_the_tensor() -> None:
    hessian = torch.eye(4, dtype=torch.float64)
    hessian[0, 1] = hessian[1, 0] = 50.0
    with pytest.raises(NumericsError, match=r"blocks\.7\.attn\.q\.weight.*not positive definite.*limit 1"):
        factorize("blocks.7.attn.q.weight", hessian, 0.01, act_order=True)


def test_nan_in_a_hessian_is_an_error_naming_the_tensor() -> None:
    hessian = torch.eye(4, dtype=torch.float64)
    hessian[2, 2] = float("nan")
    with pytest.raises(NumericsError, match=r"blocks\.7\.mlp\.fc\.weight.*NaN"):
        factorize("blocks.7.mlp.fc.weight", hessian, 0.01, act_order=True)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 6),
    width=st.integers(1, 9),
    seed=st.integers(0, 10_000),
    outlier=st.sampled_from([1.0, 1e3]),
    bits=st.integers(2, 8),
)
def test_symbols_stay_on_the_grid(rows: int, width: int, seed: int, outlier: float, bits: int) -> None:
    weight, hessian = problem(seed, rows, width, tokens=4)
    weight[0, 0] *= outlier
    scales = sdclip_scales("w", weight, bits, 12.85)
    symbols = gptq(weight, factorize("w", hessian, 0.01, act_order=True), scales, max_symbol(bits))
    assert symbols.shape == weight.shape
    assert int(symbols.abs().max()) <= max_symbol(bits)


# ---- SDClip ------------------------------------------------------------------------------------------------------


def test_scale_is_k_standard_deviations_over_the_largest_symbol() -> None:
    weight, _ = problem(7)
    scales = sdclip_scales("w", weight, 6, 12.85)
    torch.testing.assert_close(scales, 12.85 * weight.std(dim=1) / 31, rtol=1e-3, atol=0)
    assert torch.equal(scales, scales.half().float())


def test_lambda_zero_is_plain_sdclip_and_lambda_leans_on_important_rows() -> None:
    weight, hessian = problem(8)
    plain = sdclip_scales("w", weight, 6, 12.85)
    assert torch.equal(sdclip_scales("w", weight, 6, 12.85, 0.0, hessian.diagonal()), plain)
    importance = row_importance(weight, hessian.diagonal())
    assert float(importance.mean()) == pytest.approx(1.0)
    leaning = sdclip_scales("w", weight, 6, 12.85, 0.4, hessian.diagonal())
    assert torch.equal(leaning > plain, importance > 1)


def test_zero_and_constant_rows_have_usable_scales() -> None:
    weight = torch.stack((torch.zeros(8), torch.full((8,), 0.5), torch.randn(8)))
    scales = sdclip_scales("w", weight, 6, 12.85)
    symbols = round_to_nearest(weight, scales, 31)
    assert symbols[0].tolist() == [0] * 8
    assert symbols[1].tolist() == [31] * 8
    assert float(symbols[1, 0] * scales[1]) == pytest.approx(0.5, rel=1e-3)


@pytest.mark.parametrize("size", [1e-9, 1e7])
def test_scales_outside_fp16_name_the_tensor_and_row(size: float) -> None:
    weight = torch.randn(3, 8)
    weight[1] *= size
    with pytest.raises(NumericsError, match=r"tok_emb\.weight: the scale of row 1"):
        sdclip_scales("tok_emb.weight", weight, 6, 12.85)
