"""Compiled inner loops of a trellis along anti-diagonals (diagonals.py). Imported only where numba can be loaded.

As in kernels.py, each does the operations of its numpy counterpart in the same order on the same values.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pgolf_post.base.numba import jit
from pgolf_post.quantize.gptq.kernels import F


class Workspace(NamedTuple):
    """Buffers of one diagonal's search, of at most `length` weights."""

    targets: np.ndarray  # (length,) float32: what each weight should become, in steps of the union grid
    points: np.ndarray  # (length, 4) float32: each coset's point nearest to the target
    decisions: np.ndarray  # (length, states) uint8: branch bit of the path that survives in a state
    cost: np.ndarray  # (states,) float32, of the cheapest path into a state
    leaving: np.ndarray  # (2, states) float32: cost of the branches out of a state, by branch bit
    came_from: np.ndarray  # (2, states) int32: where branch bit 0, and 1, came from


@jit
def _workspace(length, came_from):  # type: ignore[no-untyped-def]
    """Allocate a Workspace."""
    states = len(came_from)
    sources = np.empty((2, states), np.int32)
    for state in range(states):
        sources[0, state] = came_from[state, 0]
        sources[1, state] = came_from[state, 1]
    return Workspace(
        np.empty(length, F), np.empty((length, 4), F), np.empty((length, states), np.uint8),
        np.empty(states, F), np.empty((2, states), F), sources,
    )  # fmt: skip


@jit
def _nearest_points(targets, bounds, points, length):  # type: ignore[no-untyped-def]
    """Write the nearest point of each coset of every weight."""
    for d in range(4):
        first, least, greatest = F(d), bounds[d, 0], bounds[d, 1]
        for place in range(length):
            k = np.rint((targets[place] - first) * F(0.25))
            k = least if k < least else k
            k = greatest if k > greatest else k
            points[place, d] = k * F(4) + first


@jit
def _forward(targets, points, cost, leaving, came_from, decisions, length):  # type: ignore[no-untyped-def]
    """Leave in `cost` what the cheapest path into every state costs after the last weight. No views: they are slow."""
    states = len(cost)
    for state in range(states):
        cost[state] = F(0) if state == 0 else F(np.inf)
    for place in range(length):
        # What a branch costs depends on its coset alone: on the state's first bit, and the branch's.
        target = targets[place]
        even_zero, odd_zero = target - points[place, 0], target - points[place, 1]
        even_one, odd_one = target - points[place, 2], target - points[place, 3]
        even_zero, odd_zero = even_zero * even_zero, odd_zero * odd_zero
        even_one, odd_one = even_one * even_one, odd_one * odd_one
        for pair in range(states // 2):
            even, odd = cost[2 * pair], cost[2 * pair + 1]
            leaving[0, 2 * pair], leaving[0, 2 * pair + 1] = even + even_zero, odd + odd_zero
            leaving[1, 2 * pair], leaving[1, 2 * pair + 1] = even + even_one, odd + odd_one
        # Of the two branches that meet in a state the cheaper survives, of equal ones that of bit 0.
        for state in range(states):
            zero, one = leaving[0, came_from[0, state]], leaving[1, came_from[1, state]]
            decisions[place, state] = one < zero
            cost[state] = one if one < zero else zero


@jit
def _search(sheet, bounds, work, first_row, diagonal, length):  # type: ignore[no-untyped-def]
    """Find the cheapest path of a diagonal; its errors go into `sheet.errors`, its symbols into `sheet.symbols`."""
    weights, steps, along, down, targets = sheet.weights, sheet.steps, sheet.along, sheet.down, work.targets
    many_rows, many_columns = len(steps) > 1, steps.shape[1] > 1
    for place in range(length):
        i = first_row + place
        j = diagonal - i
        step = steps[i if many_rows else 0, j if many_columns else 0]
        targets[place] = (weights[i, j] + along[i, j] + down[j, i]) / step
    _nearest_points(targets, bounds, work.points, length)
    _forward(targets, work.points, work.cost, work.leaving, work.came_from, work.decisions, length)
    # The cheapest end, of equal ones the lowest state, read backwards.
    state = 0
    for other in range(1, len(work.cost)):
        if work.cost[other] < work.cost[state]:
            state = other
    symbols, errors = sheet.symbols, sheet.errors
    for place in range(length - 1, -1, -1):
        i = first_row + place
        j = diagonal - i
        bit = work.decisions[place, state]
        state = work.came_from[bit, state]
        z0 = state & 1
        point = work.points[place, z0 + 2 * bit]
        step = steps[i if many_rows else 0, j if many_columns else 0]
        symbols[i, j] = np.int16((point - F(z0)) * F(0.5))
        errors[i, j] = weights[i, j] - point * step


@jit
def _hand_on(into, row, along, source, factor, start, count):  # type: ignore[no-untyped-def]
    """Add to `count` places of one row from `start` on a multiple of those of another."""
    first = np.uint64(start)
    for place in range(np.uint64(count)):
        into[row, first + place] += along[source, first + place] * factor


@jit
def sweep(sheet, grid, tile, first, stop):  # type: ignore[no-untyped-def]
    """Round diagonals first .. stop-1; see diagonals.py."""
    rows, columns = sheet.weights.shape
    errors, residuals, down, along = sheet.errors, sheet.residuals, sheet.down, sheet.along
    feedback, row_feedback = sheet.feedback, sheet.row_feedback
    coupled = len(row_feedback) > 0
    work = _workspace(min(rows, columns), grid.came_from)
    for diagonal in range(first, stop):
        first_row = max(0, diagonal - columns + 1)
        length = min(rows, diagonal + 1) - first_row
        _search(sheet, grid.bounds, work, first_row, diagonal, length)
        # Errors go into this tile and the next, downwards and to the right.
        for i in range(first_row, first_row + length):
            j = diagonal - i
            error = errors[i, j]
            residual = error + down[j, i]
            residuals[i, j] = residual
            if coupled:
                count = min(rows, (i // tile + 2) * tile) - i - 1
                _hand_on(down, j, row_feedback, i, error, i + 1, count)
            _hand_on(along, i, feedback, j, residual, j + 1, min(columns, (j // tile + 2) * tile) - j - 1)
