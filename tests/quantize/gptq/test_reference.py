"""The plain loops of reference.py: their worked examples, and every fast path gives their symbols."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pgolf_post.quantize.gptq import reference
from pgolf_post.quantize.gptq.coupled import RowFeedback
from pgolf_post.quantize.gptq.driver import INNER_COLUMNS, gptq
from pgolf_post.quantize.gptq.factorize import LDLFactor
from pgolf_post.quantize.gptq.trellis import Trellis, grid_points
from pgolf_post.quantize.gptq.viterbi import LARGEST, encode

F = np.float32
FACTORS = np.array([[1, 0.9], [0, 1]], F), np.array([[1, 0.5], [0, 1]], F)  # F, G of the worked examples


def test_the_worked_example_of_a_scalar_grid() -> None:
    weight, steps = np.array([[0.6, 0.9], [1.2, 1.8]], F), np.array([[1, 0.5], [2, 1]], F)
    assert reference.scalar_grid(weight, FACTORS[0], steps, 31).tolist() == [[1, 1], [1, 1]]
    assert np.rint(weight / steps).tolist() == [[1, 2], [1, 2]]


def test_the_worked_example_of_a_trellis() -> None:
    weight, code = np.array([[0.9, 2.2], [1.1, 2.5]], F), Trellis(4, 2)
    symbols = reference.trellis(weight, FACTORS[0], np.ones((2, 2), F), 31, code)
    assert symbols.tolist() == [[1, 1], [0, 1]]
    assert grid_points(symbols, code).tolist() == [[2, 2], [1, 3]]


def test_the_worked_examples_of_coupled_rows() -> None:
    ones = np.ones((2, 2), F)
    assert reference.coupled(F(0.6) * ones, *FACTORS, ones, 31).tolist() == [[1, 0], [0, 1]]
    weight, code = np.array([[0.9, 2.2], [1.1, 2.5]], F), Trellis(4, 2)
    symbols = reference.coupled(weight, *FACTORS, ones, 31, code)
    assert symbols.tolist() == [[0, 2], [1, 1]]
    assert grid_points(symbols, code).tolist() == [[0, 4], [2, 2]]


def test_coupled_rows_lower_the_loss_of_the_worked_example() -> None:
    """tr(C·E·H·Eᵀ) with C = GGᵀ and H = [[1, .9], [.9, 1]], by hand: .186 coupled, .286 with each row alone."""
    c, h = np.array([[1.25, 0.5], [0.5, 1]]), np.array([[1, 0.9], [0.9, 1]])
    weight, ones = np.full((2, 2), 0.6, F), np.ones((2, 2), F)
    alone, both = reference.scalar_grid(weight, FACTORS[0], ones, 31), reference.coupled(weight, *FACTORS, ones, 31)
    losses = [float(((c @ (weight - symbols) @ h) * (weight - symbols)).sum()) for symbols in (alone, both)]
    assert losses == pytest.approx([0.286, 0.186], abs=1e-6)


def upper(size: int, generator: torch.Generator, dyadic: bool) -> Tensor:  # (size, size)
    """Draw a feedback: ones on the diagonal; if dyadic, one entry in four above it is a multiple of ¼."""
    values = torch.randn(size, size, generator=generator) / size**0.5
    if dyadic:
        values = (values * 8).round().clamp(-2, 2) / 4 * (torch.rand(size, size, generator=generator) < 0.25)
    return torch.triu(values, 1) + torch.eye(size)


def compare(
    rows: int, columns: int, seed: int, code: Trellis | None, coupled: bool, largest: int | None, dyadic: bool
) -> None:
    """Draw a problem and compare both fast paths with the reference; dyadic sums are exact in any order."""
    generator = torch.Generator().manual_seed(seed)
    weight = 2 * torch.randn(rows, columns, generator=generator)
    shape = [(rows, columns), (rows, 1), (1, columns)][seed % 3]
    steps = 0.2 + torch.rand(shape, generator=generator)
    if dyadic:
        weight, steps = (weight * 8).round() / 8, 2.0 ** torch.randint(-2, 1, shape, generator=generator)
    feedback, order = upper(columns, generator, dyadic), torch.randperm(columns, generator=generator)
    factor = LDLFactor(feedback, torch.ones(columns), order, 0.0, 0, torch.float32)
    row_feedback = upper(rows, generator, False) if coupled else None
    limit = LARGEST if largest is None else largest
    visited = weight[:, order].numpy(), feedback.numpy()
    spread = steps.expand(rows, columns)[:, order].contiguous().numpy()
    if row_feedback is not None:
        wanted = reference.coupled(*visited, row_feedback.numpy(), spread, limit, code)
    elif code is not None:
        wanted = reference.trellis(*visited, spread, limit, code)
    else:
        wanted = reference.scalar_grid(*visited, spread, limit)
    for compiled in (True, False):
        symbols = gptq(weight, factor, steps, largest, trellis=code, row_feedback=row_feedback, compiled=compiled)
        assert symbols[:, order].tolist() == wanted.tolist(), f"compiled = {compiled}"


CODES = st.one_of(st.none(), st.builds(Trellis, st.sampled_from([4, 8, 64]), st.integers(1, 40)))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 14),
    columns=st.integers(1, 12),
    seed=st.integers(0, 10_000),
    code=CODES,
    coupled=st.booleans(),
    largest=st.sampled_from([None, 1, 3, 31]),
    dyadic=st.booleans(),
)
def test_every_path_gives_the_symbols_of_the_reference(
    rows: int, columns: int, seed: int, code: Trellis | None, coupled: bool, largest: int | None, dyadic: bool
) -> None:
    """Whatever the shape, the steps, the lanes and the limit; where values are dyadic, there are ties everywhere."""
    compare(rows, columns, seed, code, coupled, largest, dyadic)


@pytest.mark.parametrize("coupled", [False, True])
@pytest.mark.parametrize("code", [None, Trellis(4, 512), Trellis(4, 26)])
def test_as_many_columns_as_are_visited_one_by_one_and_more_rows_than_are_held_open(
    code: Trellis | None, coupled: bool
) -> None:
    """The window of a four-state trellis is 20 rows: lanes of 26 and 33 rows settle rows on the way."""
    compare(33, INNER_COLUMNS, 3, code, coupled, None, dyadic=False)


@pytest.mark.parametrize("code", [None, Trellis(4, 8)])
def test_blocks_of_columns_are_the_same_sums(code: Trellis | None) -> None:
    """140 columns pass through both kinds of matrix product; dyadic values make their order immaterial."""
    compare(9, 140, 4, code, False, None, dyadic=True)


@settings(max_examples=30, deadline=None)
@given(
    code=st.builds(Trellis, st.sampled_from([4, 8, 16, 32]), st.integers(1, 30)),
    rows=st.integers(1, 30),
    seed=st.integers(0, 1000),
    largest=st.sampled_from([None, 1, 2, 31]),
    ties=st.booleans(),
)
def test_the_search_alone_gives_the_paths_of_the_reference(
    code: Trellis, rows: int, seed: int, largest: int | None, ties: bool
) -> None:
    targets = 8 * torch.randn(rows, 3, generator=torch.Generator().manual_seed(seed))
    targets = torch.round(targets * 2) / 2 if ties else targets
    alone = np.eye(3, dtype=F)
    wanted = reference.trellis(targets.numpy(), alone, np.ones((rows, 3), F), largest or LARGEST, code)
    for compiled in (True, False):
        assert encode(targets, code, largest, compiled=compiled).tolist() == wanted.tolist()


def test_the_feedback_of_rows_is_rounded_to_nearest() -> None:
    """The oracle reads the same integers, so that none of its comparisons sees how they were rounded."""
    exact = upper(40, torch.Generator().manual_seed(5), False).numpy()
    above, stored = np.triu(exact, 1), RowFeedback.of(exact)
    read = stored.numbers * stored.scales[:, None].astype(np.float64)
    assert (np.abs(read - above) <= 0.501 * stored.scales[:, None]).all()
    assert np.abs(stored.numbers).max() == 32767
