"""The trellis search: optimal paths, the published gains, the same symbols compiled or not."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pgolf_post.base import numba as compiled_module
from pgolf_post.errors import NotFoundError, NumericsError
from pgolf_post.quantize.gptq.trellis import POLYNOMIALS, Trellis, first_bits, grid_points, next_states
from pgolf_post.quantize.gptq.viterbi import encode, predecessors

GAINS = {4: 0.167, 8: 0.180, 16: 0.190, 32: 0.200, 64: 0.207, 128: 0.214, 256: 0.219}  # bits per weight


def noise(rows: int, columns: int, seed: int = 0, spread: float = 8.0) -> Tensor:
    return spread * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def points_of(targets: Tensor, trellis: Trellis, **options: object) -> tuple[Tensor, Tensor]:
    """Symbols and the grid points the decoder makes of them."""
    symbols = encode(targets, trellis, **options)  # type: ignore[arg-type]
    return symbols, torch.from_numpy(grid_points(symbols.numpy(), trellis))


def conditional_entropy(symbols: np.ndarray, bits: np.ndarray) -> float:
    """H(m | z0), bits per symbol."""
    joint = np.unique(2 * symbols.astype(np.int64) + bits, return_counts=True)[1] / symbols.size
    first = np.bincount(bits.ravel()) / symbols.size
    return float(-(joint * np.log2(joint)).sum() + (first * np.log2(first)).sum())


def measured_gain(trellis: Trellis, rows: int, columns: int, spread: float = 32.0) -> float:
    """½ log2 of the squared error of a scalar grid with the entropy measured, over the trellis's, for Gaussians."""
    targets = noise(rows, columns, spread=spread)
    symbols, points = points_of(targets, trellis)
    entropy = conditional_entropy(symbols.numpy(), first_bits(symbols.numpy(), trellis))
    scalar = 2 * math.pi * math.e * spread**2 / 12 * 2 ** (-2 * entropy)
    return 0.5 * math.log2(scalar / float((targets - points).square().mean()))


@pytest.mark.parametrize("states", POLYNOMIALS)
def test_gain_on_gaussian_noise_is_the_published_one(states: int) -> None:
    assert measured_gain(Trellis(states, 1024), 2048, 256) == pytest.approx(GAINS[states], abs=0.01)


@pytest.mark.parametrize(("lane_rows", "gain"), [(64, 0.152), (128, 0.159), (1024, 0.165)])
def test_short_lanes_keep_most_of_the_gain(lane_rows: int, gain: float) -> None:
    assert measured_gain(Trellis(4, lane_rows), 2048, 256) == pytest.approx(gain, abs=0.003)


@pytest.mark.parametrize("states", POLYNOMIALS)
def test_predecessors_invert_the_state_machine(states: int) -> None:
    table = next_states(states)
    for state, came_from in enumerate(predecessors(states)):
        assert [table[came_from[bit], bit] for bit in (0, 1)] == [state, state]


@pytest.mark.parametrize("states", [4, 8, 32])
def test_no_path_is_cheaper_than_the_one_found(states: int) -> None:
    rows, trellis = 7, Trellis(states, 7)
    targets = noise(rows, 40, seed=states, spread=2.0)
    found = (targets - points_of(targets, trellis)[1]).square().sum(dim=0)
    table, cheapest = next_states(states), torch.full((40,), math.inf)
    for path in itertools.product((0, 1), repeat=rows):
        state, cost = 0, torch.zeros(40)
        for row, bit in enumerate(path):
            coset = (state & 1) + 2 * bit
            cost += (targets[row] - 4 * torch.round((targets[row] - coset) / 4) - coset).square()
            state = int(table[state, bit])
        cheapest = torch.minimum(cheapest, cost)
    torch.testing.assert_close(found, cheapest)


@settings(max_examples=60, deadline=None)
@given(
    states=st.sampled_from([4, 8, 16, 256]),
    rows=st.integers(1, 20),
    columns=st.integers(1, 9),
    lane_rows=st.integers(1, 24),
    seed=st.integers(0, 1000),
    halves=st.booleans(),
    largest=st.sampled_from([None, 1, 2, 31]),
    spread=st.sampled_from([0.0, 0.5, 8.0, 2000.0]),
)
def test_compiled_and_torch_give_the_same_symbols(
    states: int, rows: int, columns: int, lane_rows: int, seed: int, halves: bool, largest: int | None, spread: float
) -> None:
    targets = noise(rows, columns, seed, spread)
    if halves:  # ties everywhere
        targets = torch.round(targets * 2) / 2
    trellis = Trellis(states, lane_rows)
    compiled = encode(targets, trellis, largest, compiled=True)
    assert torch.equal(compiled, encode(targets, trellis, largest, compiled=False))
    if largest is not None:
        assert int(compiled.abs().max()) <= largest


def test_lanes_and_columns_are_independent() -> None:
    trellis = Trellis(8, 16)
    targets = noise(40, 70)  # two lanes and a short one, more columns than are searched together
    symbols = encode(targets, trellis)
    for rows in (slice(0, 16), slice(16, 32), slice(32, 40)):
        assert torch.equal(symbols[rows, 5:7], encode(targets[rows, 5:7], trellis))


def test_one_row_lanes_round_to_even_points() -> None:
    targets = noise(6, 5)
    symbols, points = points_of(targets, Trellis(8, 1))
    assert torch.equal(symbols, torch.round(targets / 2).to(torch.int16))
    assert torch.equal(points, 2 * symbols.int())


def test_points_lie_within_two_steps_of_unbounded_targets() -> None:
    targets = noise(64, 8, spread=3000.0)
    symbols, points = points_of(targets, Trellis(8, 64))
    assert float((points - targets).abs().max()) <= 2
    assert symbols.dtype == torch.int16
    assert int(symbols.abs().max()) > 3000


def test_clipped_symbols_are_the_nearest_allowed() -> None:
    targets = torch.tensor([[1000.0], [-1000.0]])
    symbols, points = points_of(targets, Trellis(4, 2), largest=5)
    assert symbols.tolist() == [[5], [-5]]
    assert points.tolist() == [[10], [-9]]  # after the odd symbol 5 the machine is in state 1, whose points are odd


def test_inputs_are_left_bit_identical() -> None:
    targets = noise(20, 4)
    kept = targets.clone()
    encode(targets, Trellis(8, 8))
    assert torch.equal(targets, kept)


def test_what_cannot_be_encoded_is_an_error() -> None:
    with pytest.raises(NumericsError, match="NaN or infinite"):
        encode(torch.tensor([[math.nan]]), Trellis(8, 8))
    with pytest.raises(NumericsError, match="beyond ±32766"):
        encode(torch.tensor([[1e6]]), Trellis(8, 8))
    with pytest.raises(NumericsError, match="within ±0"):
        encode(torch.tensor([[1.0]]), Trellis(8, 8), largest=0)


def test_compiled_without_numba_is_an_error_and_the_default_does_without(monkeypatch: pytest.MonkeyPatch) -> None:
    targets = noise(20, 4)
    expected = encode(targets, Trellis(8, 8), compiled=True)
    monkeypatch.setattr(compiled_module, "has_numba", lambda: False)
    assert torch.equal(encode(targets, Trellis(8, 8)), expected)
    with pytest.raises(NotFoundError, match="numba cannot be loaded"):
        encode(targets, Trellis(8, 8), compiled=True)
