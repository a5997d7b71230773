"""Feedback from both sides: one objective, one set of symbols, with and without numba, with and without a trellis."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pgolf_post.errors import MismatchError, NumericsError
from pgolf_post.quantize.gptq.coupled import depth_of
from pgolf_post.quantize.gptq.driver import gptq
from pgolf_post.quantize.gptq.factorize import LDLFactor, factorize
from pgolf_post.quantize.gptq.trellis import Trellis, grid_points


def moments(size: int, seed: int) -> Tensor:  # (size, size) float64, correlated, of mean diagonal 1
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * size, size, generator=generator).double()
    x = x @ torch.randn(size, size, generator=generator).double() + x
    sums = x.T @ x
    return sums / sums.diagonal().mean() + 0.01 * torch.eye(size).double()


def problem(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, LDLFactor, LDLFactor]:
    """A weight, the factor of its inputs and that of its outputs."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    inputs = factorize("inputs", moments(columns, seed + 1), 1e-6, act_order=True)
    return weight, inputs, factorize("outputs", moments(rows, seed + 2), 1e-6, act_order=False)


def loss(error: Tensor, seed: int = 0) -> float:
    """tr(C·E·M·Eᵀ) of `problem`'s moments."""
    rows, columns = error.shape
    c, m = (moments(size, seed + place) for size, place in ((rows, 2), (columns, 1)))
    return float(((c @ error.double() @ m) * error.double()).sum())


def sloped(inputs: LDLFactor, outputs: LDLFactor, constant: float) -> Tensor:  # (rows, columns): equal slope
    return constant / (outputs.lengths[:, None] * inputs.column_lengths)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 40), (70, 33), (40, 5)])
def test_every_rounding_error_after_feedback_is_at_most_half_a_step(rows: int, columns: int) -> None:
    """tr(C·E·M·Eᵀ) = Σ D_i·ℓ_j²·ρ_ij², so steps of equal slope c bound it by N·c²/4, whatever C, M and W are."""
    weight, inputs, outputs = problem(rows, columns)
    steps = sloped(inputs, outputs, 0.3)
    symbols = gptq(weight, inputs, steps, None, row_feedback=outputs.feedback)
    assert loss(weight - symbols * steps) <= rows * columns * 0.3**2 / 4 * 1.001
    if rows > 30:
        alone = gptq(weight, inputs, steps, None)
        assert loss(weight - alone * steps) > 2 * loss(weight - symbols * steps)


@pytest.mark.parametrize(("rows", "lane_rows"), [(96, 96), (80, 50), (33, 16)])
def test_a_trellis_gains_on_coupled_rows_what_it_gains_on_others(rows: int, lane_rows: int) -> None:
    weight, inputs, outputs = problem(rows, 48)
    steps = sloped(inputs, outputs, 0.3)
    scalar = gptq(weight, inputs, steps, None, row_feedback=outputs.feedback)
    trellis = Trellis(8, lane_rows)
    symbols = gptq(weight, inputs, steps / 2, None, trellis=trellis, row_feedback=outputs.feedback)
    points = torch.from_numpy(grid_points(symbols.numpy(), trellis))
    assert loss(weight - points * steps / 2) < 0.95 * loss(weight - scalar * steps)


@pytest.mark.parametrize("states", [0, 4, 64])
@pytest.mark.parametrize("largest", [None, 3])
def test_the_compiled_kernel_gives_the_same_symbols(states: int, largest: int | None) -> None:
    depth = depth_of(states or 1)
    weight, inputs, outputs = problem(depth + 21, 37, seed=states)
    trellis = Trellis(states, depth + 9) if states else None
    steps = sloped(inputs, outputs, 0.2)
    ours, theirs = (
        gptq(weight, inputs, steps, largest, trellis=trellis, row_feedback=outputs.feedback, compiled=compiled)
        for compiled in (False, True)
    )
    assert torch.equal(ours, theirs)
    assert largest is None or int(ours.abs().max()) == largest


@pytest.mark.parametrize("states", [0, 8])
def test_rows_that_are_not_coupled_are_rounded_as_if_alone(states: int) -> None:
    """In lanes of at most `depth_of` rows, nothing is settled before its end, and the search is Viterbi's."""
    weight, inputs, _ = problem(depth_of(8) + 5, 20)
    trellis = Trellis(states, depth_of(8)) if states else None
    steps = torch.full((len(weight),), 0.25)  # whose inverse is exact
    alone = gptq(weight, inputs, steps, None, trellis=trellis)
    assert torch.equal(gptq(weight, inputs, steps, None, trellis=trellis, row_feedback=torch.eye(len(weight))), alone)


def test_what_cannot_be_coupled_is_refused() -> None:
    weight, inputs, outputs = problem(6, 4)
    steps = torch.ones(6)
    with pytest.raises(MismatchError, match=r"w: a row feedback of shape \(5, 5\) for 6 rows"):
        gptq(weight, inputs, steps, None, row_feedback=outputs.feedback[:5, :5], name="w")
    broken = outputs.feedback.clone()
    broken[0, 1] = float("nan")
    with pytest.raises(NumericsError, match=r"row feedback at \[0, 1\] is nan"):
        gptq(weight, inputs, steps, None, row_feedback=broken)
