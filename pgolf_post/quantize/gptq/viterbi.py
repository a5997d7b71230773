"""The trellis's encoder: among all paths through a lane, the one whose grid points lie closest to the targets.

A state allows two cosets of the union grid, D_d = {n : n mod 4 = d} with d = z0 or z0 + 2, and the nearest point of
each is all a path can want of it; so there are two branches per state, and of the two that meet in a state only the
cheaper can lead anywhere (Viterbi). A branch costs (u - n)². A lane is a sequence of rows of one column, and nothing
couples lanes, so any number is searched at once.

The symbols are part of an artifact's identity, so this fixes them: all arithmetic is float32 in the order written here,
of two equally cheap branches into a state that of branch bit 0 survives, and of equally cheap ends the lowest state
wins. The compiled kernel does the same operations in the same order and gives the same symbols.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pgolf_post.base.numba import use_compiled
from pgolf_post.base.workers import map_items
from pgolf_post.errors import NumericsError
from pgolf_post.quantize.gptq.trellis import Trellis, next_states

LARGEST = 32767  # of an unbounded symbol: what 16 bits hold
LANES = 64  # searched together: their costs and decisions stay in cache


@lru_cache
def predecessors(states: int) -> np.ndarray:  # (states, 2) int64: where branch bit 0, and 1, came from
    """Return the transition table read backwards."""
    table = np.empty((states, 2), np.int64)
    for state, following in enumerate(next_states(states)):
        table[following, [0, 1]] = state
    return table


def coset_bounds(largest: int) -> np.ndarray:  # (4, 2) float32
    """Return the least and greatest k for which the point 4k + d is a symbol within ±largest, for each coset d."""
    bits = np.arange(4) // 2
    return np.stack((np.ceil((-largest - bits) / 2), np.floor((largest - bits) / 2)), axis=1).astype(np.float32)


class Grid(NamedTuple):
    """Points of the union grid that a path may use, as the kernels take them."""

    came_from: np.ndarray  # (states, 2) int64: where branch bit 0, and 1, came from
    bounds: np.ndarray  # (4, 2) float32 of the cosets, as coset_bounds
    lane_rows: int  # rows after which the state restarts at 0

    @classmethod
    def of(cls, states: int, lane_rows: int, largest: int) -> Grid:
        """Return the grid of a trellis whose symbols stay within ±largest."""
        return cls(predecessors(states), coset_bounds(largest), lane_rows)


def search(
    targets: Tensor,  # (rows, lanes) float32, in union-grid steps
    states: int,
    bounds: Tensor,  # (4, 2) float32
) -> tuple[Tensor, Tensor]:  # (rows, lanes) float32 each: grid points, symbols
    """Return the cheapest path of every lane, in torch."""
    came_from = torch.from_numpy(predecessors(states)).to(targets.device)
    coset = (came_from & 1) + torch.tensor([0, 2], device=targets.device)  # (states, 2), of the branches into a state
    rows, lanes = targets.shape
    # The nearest point of each coset, and its squared distance: all that branches cost.
    first = torch.arange(4, dtype=torch.float32, device=targets.device)[:, None]
    multiple = torch.round((targets[:, None] - first) * 0.25)  # (rows, 4, lanes)
    points = torch.clamp(multiple, bounds[:, :1], bounds[:, 1:]) * 4 + first
    metric = (targets[:, None] - points).square()
    # Forward: the cheaper of the two branches into each state survives.
    cost = torch.full((states, lanes), math.inf, device=targets.device)
    cost[0] = 0
    decisions = torch.empty(rows, states, lanes, dtype=torch.bool, device=targets.device)
    for row in range(rows):
        zero, one = cost[came_from[:, 0]] + metric[row, coset[:, 0]], cost[came_from[:, 1]] + metric[row, coset[:, 1]]
        torch.less(one, zero, out=decisions[row])
        cost = torch.where(decisions[row], one, zero)
    # Backward from the cheapest end.
    state, lane = cost.argmin(dim=0), torch.arange(lanes, device=targets.device)  # argmin: the first of equals
    chosen, symbols = torch.empty_like(targets), torch.empty_like(targets)
    for row in reversed(range(rows)):
        bit = decisions[row, state, lane].long()
        chosen[row] = points[row, coset[state, bit], lane]
        state = came_from[state, bit]
        symbols[row] = (chosen[row] - (state & 1)) * 0.5
    return chosen, symbols


def encode(
    targets: Tensor,  # (rows, columns) float32: weights in units of the union grid's step
    trellis: Trellis,
    largest: int | None = None,  # symbols stay within ±largest; None: within what 16 bits hold
    compiled: bool | None = None,  # None: where numba can be loaded and targets are on the CPU
) -> Tensor:  # (rows, columns) int16
    """Return the symbols whose grid points (`trellis.grid_points`) have the least Σ (u - n)² in every lane.

    For the bits of a scalar grid of step Δ, take union-grid steps of Δ/2.
    Raises NumericsError for NaN, infinity, or an unbounded symbol that needs more than 16 bits.
    """
    if not torch.isfinite(targets).all():
        raise NumericsError("trellis: a target is NaN or infinite")
    check_largest(largest)
    symbols = torch.empty(targets.shape, dtype=torch.int16, device=targets.device)
    grid = Grid.of(trellis.states, trellis.lane_rows, LARGEST if largest is None else largest)
    fast = use_compiled(compiled, targets)

    def run(place: tuple[slice, slice]) -> None:
        lane = targets[place].float()
        if fast:
            from pgolf_post.quantize.gptq import kernels

            symbols[place] = torch.from_numpy(kernels.search(lane.contiguous().numpy(), grid))
        else:
            bounds = torch.from_numpy(grid.bounds).to(lane.device)
            symbols[place] = search(lane, trellis.states, bounds)[1].to(torch.int16)

    rows, columns = targets.shape
    places = [
        (slice(row, row + trellis.lane_rows), slice(column, column + LANES))
        for row in range(0, rows, trellis.lane_rows)
        for column in range(0, columns, LANES)
    ]
    for _ in map_items(run, places):
        pass
    check_range("trellis", symbols, largest)
    return symbols


def check_largest(largest: int | None) -> None:
    """Raises NumericsError for a symbol range that no path can keep to, or that int16 cannot hold."""
    if largest is not None and not 1 <= largest <= LARGEST:
        raise NumericsError(f"symbols within ±{largest}: the limit must be 1 .. {LARGEST}")


def check_range(name: str, symbols: Tensor, largest: int | None) -> None:
    """Raises NumericsError if an unbounded symbol reached the end of what 16 bits hold."""
    if largest is None and symbols.numel() and int(symbols.to(torch.int32).abs().max()) >= LARGEST:
        raise NumericsError(
            f"{name}: a symbol beyond ±{LARGEST - 1} is needed",
            hint="coarser steps: a larger --clip; in a fit, a smaller --budget",
        )
