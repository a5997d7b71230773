"""Laws of equal slope: what the steps cost is known before anything is rounded."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pgolf_post.fit.estimate import Spread, gaussian_bits
from pgolf_post.fit.steps import constant_for, expected_loss, relative_steps
from pgolf_post.quantize.gptq.driver import gptq
from pgolf_post.quantize.gptq.factorize import factorize
from pgolf_post.quantize.rows import entropy_bits
from pgolf_post.quantize.tensor import scale_of


def problem(rows: int, columns: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gaussian weights, correlated inputs' moments and uneven rows of mean 1."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    inputs = torch.randn(4 * columns, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    weights = torch.rand(rows, generator=generator, dtype=torch.float64) * 3 + 0.1
    return weight, (inputs.T @ inputs / len(inputs)).double(), weights / weights.mean()


@pytest.mark.parametrize("seed", [0, 1])
def test_every_weight_costs_the_constant_squared_over_24(seed: int) -> None:
    weight, moments, rows = problem(96, 64, seed)
    factor, constant = factorize("w", moments, 1e-9, act_order=True), 0.02
    steps = scale_of(relative_steps(rows, factor.column_lengths).factors(constant), *weight.shape)
    symbols = gptq(weight, factor, torch.from_numpy(steps), None)
    error = (symbols * torch.from_numpy(steps) - weight).double()
    measured = 0.5 * float(((error @ moments) * error).sum(1) @ rows)
    assert measured == pytest.approx(expected_loss(weight.numel(), constant), rel=0.06)


@pytest.mark.parametrize("seed", [0, 1])
def test_with_coupled_rows_as_well(seed: int) -> None:
    """tr(C·E·M·Eᵀ)/2 of dense C and M: what is left of both after feedback costs c²/24 a weight."""
    weight, moments, _ = problem(96, 64, seed)
    _, outputs, _ = problem(1, 96, seed + 7)
    outputs /= outputs.diagonal().mean()
    factor, row_factor = factorize("in", moments, 1e-9, act_order=True), factorize("out", outputs, 1e-9, False)
    pivots, constant = row_factor.lengths.double().square(), 0.01
    steps = torch.from_numpy(scale_of(relative_steps(pivots, factor.column_lengths).factors(constant), 96, 64))
    symbols = gptq(weight, factor, steps, None, row_feedback=row_factor.feedback)
    error = (symbols * steps - weight).double()
    measured = 0.5 * float(((outputs @ error @ moments) * error).sum())
    assert measured == pytest.approx(expected_loss(weight.numel(), constant), rel=0.06)


def test_steps_are_inverse_to_what_rows_and_columns_mind() -> None:
    rows, lengths = torch.tensor([0.25, 1.0, 1.75], dtype=torch.float64), torch.tensor([0.5, 1.0, 2.0, 8.0])
    steps = scale_of(relative_steps(rows, lengths).factors(0.1), 3, 4)
    wanted = 0.1 / (rows.sqrt()[:, None] * lengths[None, :]).numpy()
    assert np.abs(np.log2(steps / wanted)).max() <= 1 / 8 + 1e-3  # each exponent is rounded to an eighth


def test_equal_inputs_and_rows_give_one_step() -> None:
    steps = scale_of(relative_steps(torch.ones(5).double(), torch.ones(7)).factors(0.3), 5, 7)
    assert np.ptp(steps) == 0
    assert steps.flat[0] == pytest.approx(0.3, rel=1e-3)


def test_without_columns_all_share_the_geometric_mean() -> None:
    shape = relative_steps(torch.ones(2).double(), torch.tensor([1.0, 4.0]), by_column=False)
    assert np.ptp(shape.columns) == 0
    assert shape.unit == pytest.approx(0.5)


@pytest.mark.parametrize("constant", [1e-12, 1e-8, 3e-5, 1.0, 60000.0, 1e6, 1e15])
def test_a_step_of_any_size_is_stored(constant: float) -> None:
    """Octaves beyond fp16's range go into the rows' exponents, which then take 16 bits."""
    steps = relative_steps(torch.ones(2).double(), torch.ones(3))
    factors = steps.factors(constant)
    assert scale_of(factors, 2, 3) == pytest.approx(np.full((2, 3), constant), rel=1e-3)
    assert factors[1].values.dtype == (np.int8 if 6.2e-5 <= constant <= 65504 else np.int16)


def test_constant_and_loss_are_inverse() -> None:
    assert expected_loss(1000, constant_for(1000, 0.004)) == pytest.approx(0.004)


@pytest.mark.parametrize("step", [0.05, 0.5, 2.0, 8.0])
def test_entropy_of_a_rounded_gaussian_is_what_the_table_says(step: float) -> None:
    symbols = np.round(np.random.default_rng(0).standard_normal((400, 400)) / step).astype(np.int16)
    assert gaussian_bits(np.log2(1 / step)) == pytest.approx(entropy_bits(symbols), abs=0.01)


def test_bits_of_a_matrix_are_those_of_its_weights_one_by_one() -> None:
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand(24, 1, generator=generator).exp() * torch.rand(1, 40, generator=generator).exp()
    weight = torch.randn(24, 40, generator=generator) * scale
    steps = relative_steps(
        torch.rand(24, generator=generator).double() + 0.1, torch.rand(40, generator=generator) + 0.1
    )
    matrix: Any = SimpleNamespace(weight=weight, steps=steps)
    values = weight.double().numpy()
    rows, columns = (np.sqrt(np.square(values).mean(axis)) for axis in (1, 0))
    sigma = rows[:, None] * columns / np.sqrt(np.square(values).mean())
    for constant in (0.01, 0.3, 3.0):
        one_by_one = gaussian_bits(np.log2(sigma / scale_of(steps.factors(constant), 24, 40))).sum()
        assert Spread.of(matrix).bits(constant) == pytest.approx(one_by_one, rel=0.002, abs=1.0)
