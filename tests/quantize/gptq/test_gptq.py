"""GPTQ laws: the worked example, H = I is rounding to nearest, never worse than rounding in its own measure."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pgolf_post.errors import MismatchError, NumericsError
from pgolf_post.quantize.clip import grid_steps, max_symbol
from pgolf_post.quantize.gptq.driver import FactorCache, Job, factorize, gptq, gptq_jobs, hessian_error
from pgolf_post.quantize.gptq.trellis import Trellis, grid_points
from pgolf_post.quantize.gptq.viterbi import encode
from pgolf_post.quantize.rtn import round_to_nearest
from pgolf_post.rules import RtnRule


def problem(seed: int, rows: int = 12, width: int = 20, tokens: int = 64) -> tuple[Tensor, Tensor]:
    """A random matrix and the Hessian of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator)
    inputs = (torch.randn(tokens, width, generator=generator) @ mixing).double()
    return torch.randn(rows, width, generator=generator), inputs.mT @ inputs / tokens


def sdclip_steps(weight: Tensor, bits: int, clip: float) -> Tensor:  # (rows,)
    return grid_steps("w", weight, RtnRule(name="r", bits=bits), clip)


def quantized(weight: Tensor, hessian: Tensor, steps: Tensor, act_order: bool = True, block: int = 8) -> Tensor:
    return gptq(weight, factorize("w", hessian, 0.01, act_order), steps, 31, block)


def test_the_worked_example_of_the_docstring() -> None:
    hessian = torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=torch.float64)
    weight, steps = torch.tensor([[0.6, 0.6]]), torch.ones(1)
    factor = factorize("w", hessian, 1e-9, act_order=False)
    symbols = gptq(weight, factor, steps, 31)
    assert symbols.tolist() == [[1, 0]]
    nearest = round_to_nearest(weight, steps, 31)
    assert nearest.tolist() == [[1, 1]]
    energy = float((weight.double() @ hessian @ weight.double().mT).item())
    assert hessian_error(weight, nearest.float(), hessian) * energy == pytest.approx(0.608, abs=1e-6)
    assert hessian_error(weight, symbols.float(), hessian) * energy == pytest.approx(0.088, abs=1e-6)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("block", [1, 7, 128])
def test_identity_hessian_is_round_to_nearest(act_order: bool, block: int) -> None:
    weight, _ = problem(0)
    steps = sdclip_steps(weight, 6, 8.0)
    symbols = quantized(weight, torch.eye(20, dtype=torch.float64), steps, act_order, block)
    assert torch.equal(symbols, round_to_nearest(weight, steps, 31))


def test_error_is_at_most_that_of_rounding_on_200_problems() -> None:
    worse, ratios = 0, []
    for seed in range(200):
        weight, hessian = problem(seed)
        steps = sdclip_steps(weight, 4, 6.0)
        errors = [
            hessian_error(weight, symbols * steps[:, None], hessian)
            for symbols in (quantized(weight, hessian, steps), round_to_nearest(weight, steps, 31))
        ]
        worse += errors[0] > errors[1]
        ratios.append(errors[0] / errors[1])
    assert worse == 0
    assert sum(ratios) / len(ratios) < 0.6


@pytest.mark.parametrize("block", [1, 3, 20, 64])
def test_block_size_changes_nothing(block: int) -> None:
    weight, hessian = problem(1)
    steps = sdclip_steps(weight, 6, 8.0)
    assert torch.equal(quantized(weight, hessian, steps, block=block), quantized(weight, hessian, steps, block=20))


def test_permuting_inputs_permutes_the_symbols() -> None:
    weight, hessian = problem(2)
    steps = sdclip_steps(weight, 6, 8.0)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    permuted = quantized(weight[:, order], hessian[order][:, order], steps)
    assert torch.equal(permuted, quantized(weight, hessian, steps)[:, order])


def test_inputs_are_left_bit_identical() -> None:
    weight, hessian = problem(3)
    kept = weight.clone(), hessian.clone()
    quantized(weight, hessian, sdclip_steps(weight, 6, 8.0))
    assert torch.equal(weight, kept[0])
    assert torch.equal(hessian, kept[1])


def test_thread_count_changes_no_symbol() -> None:
    weight, hessian = problem(4, rows=40, width=200, tokens=400)
    steps = sdclip_steps(weight, 6, 8.0)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(quantized(weight, hessian, steps, block=64))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])


def test_dead_columns_are_rounded_to_nearest() -> None:
    weight, hessian = problem(5)
    hessian[:, 4] = 0
    hessian[4, :] = 0
    steps = sdclip_steps(weight, 6, 8.0)
    factor = factorize("w", hessian, 0.01, act_order=True)
    assert factor.dead_columns == 1
    symbols = gptq(weight, factor, steps, 31)
    assert torch.equal(symbols[:, 4], round_to_nearest(weight, steps, 31)[:, 4])


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
    steps = sdclip_steps(weight, bits, 12.85)
    symbols = gptq(weight, factorize("w", hessian, 0.01, act_order=True), steps, max_symbol(bits))
    assert symbols.shape == weight.shape
    assert int(symbols.abs().max()) <= max_symbol(bits)


# ---- Any steps, trellis, many matrices -----------------------------------------------------------------------------

CORRELATED = torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=torch.float64)


def test_a_worked_example_with_column_scales() -> None:
    """Steps (1, ½) and (2, 1). First column: .6 → 1 leaves -.4; the second becomes .9 - .36 = .54, 1.08 steps → 1."""
    weight, steps = torch.tensor([[0.6, 0.9], [1.2, 1.8]]), torch.tensor([[1.0], [2.0]]) * torch.tensor([1.0, 0.5])
    factor = factorize("w", CORRELATED, 1e-9, act_order=False)
    assert gptq(weight, factor, steps, 31).tolist() == [[1, 1], [1, 1]]
    assert torch.round(weight / steps).tolist() == [[1, 2], [1, 2]]


def test_a_worked_example_with_a_trellis() -> None:
    """Column (.9, 1.1): the first row may use 0 or 2. After 0 come even points: (0, 2) costs .81 + .81. After 2 come
    odd ones: (2, 1) costs 1.21 + .01, and is taken: symbols (1, 0). Its errors (-1.1, .1) make (2.2, 2.5) of the second
    column (1.21, 2.59): (0, 2) costs 1.46 + .35, (2, 3) costs .62 + .17: symbols (1, 1).
    """
    weight, trellis = torch.tensor([[0.9, 2.2], [1.1, 2.5]]), Trellis(4, 2)
    factor = factorize("w", CORRELATED, 1e-9, act_order=False)
    symbols = gptq(weight, factor, torch.ones(2), None, trellis=trellis)
    assert symbols.tolist() == [[1, 1], [0, 1]]
    assert grid_points(symbols.numpy(), trellis).tolist() == [[2, 2], [1, 3]]


RULES = [None, Trellis(8, 16)]


@pytest.mark.parametrize("trellis", RULES)
@pytest.mark.parametrize("steps_shape", [(300,), (300, 1), (1, 70), (300, 70)])
@pytest.mark.parametrize("act_order", [True, False])
def test_compiled_and_torch_give_the_same_symbols(
    trellis: Trellis | None, steps_shape: tuple[int, ...], act_order: bool
) -> None:
    weight, hessian = problem(9, rows=300, width=70, tokens=200)
    factor = factorize("w", hessian, 0.01, act_order)
    steps = 0.2 + torch.rand(steps_shape, generator=torch.Generator().manual_seed(0))
    compiled, plain = (
        gptq(weight, factor, steps, None, 48, trellis=trellis, compiled=which) for which in (True, False)
    )
    assert compiled.dtype == torch.int16
    assert torch.equal(compiled, plain)


@pytest.mark.parametrize("trellis", RULES)
def test_an_identity_hessian_leaves_columns_alone(trellis: Trellis | None) -> None:
    weight, _ = problem(10, rows=50)
    steps = 0.1 + torch.rand(50, 20, generator=torch.Generator().manual_seed(1))
    factor = factorize("w", torch.eye(20, dtype=torch.float64), 0.01, act_order=True)
    alone = encode(weight / steps, trellis) if trellis else torch.round(weight / steps).to(torch.int16)
    assert torch.equal(gptq(weight, factor, steps, None, trellis=trellis), alone)


def test_lanes_are_independent_and_so_are_rows_without_a_trellis() -> None:
    weight, hessian = problem(11, rows=700, width=40, tokens=100)
    factor, steps = factorize("w", hessian, 0.01, act_order=True), torch.full((700,), 0.3)
    whole = gptq(weight, factor, steps, 31)
    for rows in (slice(3, 4), slice(0, 256), slice(250, 700)):
        assert torch.equal(whole[rows], gptq(weight[rows], factor, steps[rows], 31))
    trellis = Trellis(8, 64)  # 700 rows: chunks of 8 lanes, 2 left over, and a short one
    whole = gptq(weight, factor, steps, None, trellis=trellis)
    for rows in (slice(64, 128), slice(448, 700)):
        assert torch.equal(whole[rows], gptq(weight[rows], factor, steps[rows], None, trellis=trellis))


@pytest.mark.parametrize("trellis", RULES)
def test_permuting_rows_permutes_a_scalar_grid_and_permuting_lanes_a_trellis(trellis: Trellis | None) -> None:
    weight, hessian = problem(12, rows=64)
    unit = trellis.lane_rows if trellis else 1
    order = torch.arange(64).view(-1, unit).flip(0).flatten()
    factor, steps = factorize("w", hessian, 0.01, act_order=False), torch.full((64,), 0.3)
    permuted = gptq(weight[order], factor, steps, None, trellis=trellis)
    assert torch.equal(permuted, gptq(weight, factor, steps, None, trellis=trellis)[order])


@pytest.mark.parametrize("trellis", RULES)
def test_many_jobs_are_each_as_if_alone_whatever_the_threads(trellis: Trellis | None) -> None:
    problems = [problem(seed, rows, width, 2 * width) for seed, rows, width in ((1, 40, 160), (2, 600, 30), (3, 1, 5))]
    jobs = [
        Job(
            f"w{width.size(1)}", width, factorize("w", hessian, 0.01, True), torch.full((len(width),), 0.4), 90, trellis
        )
        for width, hessian in problems
    ]
    alone = [gptq(job.weight, job.factor, job.steps, 90, trellis=trellis) for job in jobs]
    threads, done = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            together = gptq_jobs(jobs, advance=done.append)
            assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert sum(done) == 2 * sum(job.weight.numel() for job in jobs)


def test_a_finer_trellis_has_a_smaller_error_than_a_scalar_grid_of_its_rate() -> None:
    better = 0
    for seed in range(40):
        weight, hessian = problem(seed, rows=64)
        factor, steps, trellis = factorize("w", hessian, 0.01, True), torch.full((64,), 0.2), Trellis(8, 64)
        scalar = gptq(weight, factor, steps, None).float() * steps[:, None]
        symbols = gptq(weight, factor, steps / 2, None, trellis=trellis).numpy()
        found = torch.from_numpy(grid_points(symbols, trellis)).float() * steps[:, None] / 2
        better += hessian_error(weight, found, hessian) < hessian_error(weight, scalar, hessian)
    assert better >= 36


def test_duplicate_columns_and_a_rank_deficient_hessian_stay_finite_and_close() -> None:
    weight, _ = problem(13, rows=8, width=12)
    inputs = torch.randn(5, 12, generator=torch.Generator().manual_seed(3)).double()
    inputs[:, 7] = inputs[:, 2]
    hessian = inputs.mT @ inputs
    factor = factorize("w", hessian, 0.01, act_order=True)
    steps = torch.full((8,), 0.5)
    restored = gptq(weight, factor, steps, None) * steps[:, None]
    nearest = torch.round(weight / steps[:, None]) * steps[:, None]
    assert hessian_error(weight, restored, hessian) < 0.5 * hessian_error(weight, nearest, hessian)


@pytest.mark.parametrize("trellis", RULES)
def test_zero_rows_one_by_one_and_empty_matrices(trellis: Trellis | None) -> None:
    weight, hessian = problem(14)
    weight[3:9] = 0
    factor = factorize("w", hessian, 0.01, act_order=True)
    symbols = gptq(weight, factor, torch.ones(12), 31)
    assert not symbols[3:9].any()
    single = factorize("w", torch.ones(1, 1, dtype=torch.float64), 0.01, act_order=True)
    assert gptq(torch.tensor([[4.2]]), single, torch.ones(1), 31, trellis=trellis).tolist() == [[2 if trellis else 4]]
    assert gptq(weight[:0], factor, torch.ones(0), 31, trellis=trellis).shape == (0, 20)


def test_unbounded_symbols_reach_outliers_and_stop_at_16_bits() -> None:
    weight, hessian = problem(15)
    weight[2, 5] = 5000.0
    factor = factorize("w", hessian, 0.01, act_order=True)
    assert int(gptq(weight, factor, torch.full((12,), 0.5), None)[2, 5]) == pytest.approx(10_000, abs=2)
    with pytest.raises(NumericsError, match=r"blocks\.1\.q: a symbol beyond ±32766"):
        gptq(weight, factor, torch.full((12,), 0.1), None, name="blocks.1.q")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_values_name_the_tensor_and_place(bad: float) -> None:
    weight, hessian = problem(16)
    factor = factorize("w", hessian, 0.01, act_order=True)
    broken, steps = weight.clone(), torch.ones(12)
    broken[3, 4] = bad
    with pytest.raises(NumericsError, match=r"blocks\.1\.q: its weight at \[3, 4\] is (nan|inf)"):
        gptq(broken, factor, steps, 31, name="blocks.1.q")
    steps[7] = 0
    with pytest.raises(NumericsError, match=r"blocks\.1\.q: its step at \[7\] is 0"):
        gptq(weight, factor, steps, 31, name="blocks.1.q")


@pytest.mark.parametrize("shape", [(11,), (12, 19), (1, 12), (12, 20, 1)])
def test_shapes_that_do_not_fit_name_the_tensor(shape: tuple[int, ...]) -> None:
    weight, hessian = problem(17)
    factor = factorize("w", hessian, 0.01, act_order=True)
    with pytest.raises(MismatchError, match=r"blocks\.1\.q: steps"):
        gptq(weight, factor, torch.ones(shape), 31, name="blocks.1.q")
    with pytest.raises(MismatchError, match=r"blocks\.1\.q: a weight of shape \(12, 5\)"):
        gptq(weight[:, :5], factor, torch.ones(12), 31, name="blocks.1.q")


# ---- Factors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 63, 64, 65, 200])
def test_factors_multiply_to_the_damped_hessian_and_lengths_are_those_of_its_inverse(size: int) -> None:
    _, hessian = problem(18, width=size, tokens=3 * size)
    factor = factorize("w", hessian, 0.01, act_order=True)
    damped = (hessian + factor.damp * hessian.diagonal().mean() * torch.eye(size))[factor.order][:, factor.order]
    feedback, lengths = factor.feedback.double(), factor.lengths.double()
    assert torch.equal(feedback, feedback.triu())
    assert torch.equal(feedback.diagonal(), torch.ones(size, dtype=torch.float64))
    torch.testing.assert_close((feedback * lengths**2) @ feedback.mT, damped, rtol=1e-4, atol=1e-4)
    usual = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    torch.testing.assert_close(lengths, 1 / usual.diagonal(), rtol=1e-3, atol=0)
    assert torch.equal(factor.column_lengths[factor.order], factor.lengths)


def test_symbols_are_those_of_the_usual_form() -> None:
    """Errors over U_jj subtracted along the rows of U, H⁻¹ = UᵀU, in float64."""
    weight, hessian = problem(21, rows=30, width=40, tokens=200)
    factor = factorize("w", hessian, 0.01, act_order=True)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(40)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped[factor.order][:, factor.order]), upper=True)
    columns, expected = weight[:, factor.order].T.double(), torch.empty(40, 30)
    for j in range(40):
        expected[j] = torch.round(columns[j] / 0.3)
        columns[j + 1 :] -= torch.outer(upper[j, j + 1 :], (columns[j] - 0.3 * expected[j]) / upper[j, j])
    symbols = gptq(weight, factor, torch.full((30,), 0.3), None)
    assert torch.equal(symbols[:, factor.order].T.float(), expected)


def test_well_conditioned_hessians_take_float32_and_others_float64() -> None:
    _, hessian = problem(19, tokens=400)
    assert factorize("w", hessian, 0.01, act_order=True).precision == torch.float32
    near = torch.outer(*[torch.randn(20, generator=torch.Generator().manual_seed(0)).double()] * 2)
    factor = factorize("w", near, 1e-6, act_order=True)
    assert (factor.precision, factor.damp) == (torch.float64, 1e-6)


def test_a_cache_factorizes_each_site_once() -> None:
    asked: list[str] = []
    hessians = {site: problem(seed)[1] for seed, site in enumerate(("attn.in", "mlp.in"))}

    def hessian_of(site: str) -> Tensor:
        asked.append(site)
        return hessians[site]

    cache = FactorCache(hessian_of)
    cache.fill(["attn.in", "mlp.in", "attn.in"], 0.01, True)
    first = cache.get("attn.in", 0.01, True)
    assert cache.get("attn.in", 0.01, True) is first
    assert sorted(asked) == ["attn.in", "mlp.in"]
    assert torch.equal(first.feedback, factorize("w", hessians["attn.in"], 0.01, True).feedback)
    assert not torch.equal(cache.get("attn.in", 0.1, True).feedback, first.feedback)
    assert len(asked) == 3


# ---- The prediction every allocation rests on ----------------------------------------------------------------------


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("trellis", [None, Trellis(8, 64)])
def test_equal_slope_steps_cost_what_theory_says(act_order: bool, trellis: Trellis | None) -> None:
    """Δ_ij = c / (sqrt(g_i)·ℓ_j) makes ½ Σ_i g_i e_i H e_iᵀ = N·η·c²/24, η the grid's squared error over a scalar's."""
    rows, width, c = 512, 96, 0.05
    weight, hessian = problem(20, rows, width, tokens=300)
    factor = factorize("w", hessian, 0.01, act_order)
    damped = hessian + factor.damp * hessian.diagonal().mean() * torch.eye(width)
    row_weight = torch.exp(torch.randn(rows, generator=torch.Generator().manual_seed(2)))
    steps = c / (row_weight.sqrt()[:, None] * factor.column_lengths)
    eta = 1.0
    if trellis is None:
        points = gptq(weight, factor, steps, None).float()
    else:
        steps = steps / 2
        points = torch.from_numpy(grid_points(gptq(weight, factor, steps, None, trellis=trellis).numpy(), trellis))
        noise = 32 * torch.randn(rows, width, generator=torch.Generator().manual_seed(3))
        reached = torch.from_numpy(grid_points(encode(noise, trellis).numpy(), trellis))
        eta = float((noise - reached).square().mean()) / (2**2 / 12)
        assert 0.77 < eta < 0.82  # 0.16 bit of gain
    error = (weight - points * steps).double()
    loss = 0.5 * float((row_weight.double() * ((error @ damped) * error).sum(dim=1)).sum())
    assert loss == pytest.approx(rows * width * eta * c**2 / 24, rel=0.02)
