"""Compiled inner loops of rounding with coupled rows (coupled.py). Imported only where numba can be loaded.

As in kernels.py, each does the operations of its numpy counterpart in the same order on the same values.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pgolf_post.base.numba import jit
from pgolf_post.quantize.gptq.kernels import F, feed


class Column(NamedTuple):
    """One column while it is rounded, each (rows,) float32."""

    weight: np.ndarray
    correction: np.ndarray  # what the errors of earlier columns ask for
    step: np.ndarray
    shift: np.ndarray  # what settled rows above ask for; grows


class Survivors(NamedTuple):
    """The cheapest path into each state, twice: before a row and after it."""

    cost: np.ndarray  # (2, states) float32
    pending: np.ndarray  # (2, states, depth + 1) float32: what a path asks of the next rows; the last stays 0
    history: np.ndarray  # (2, states, depth + 1) uint8: the states it has been in


class Workspace(NamedTuple):
    """Buffers of a column's search."""

    survivors: Survivors
    target: np.ndarray  # (states,) float32
    branch_cost: np.ndarray  # (2, states) float32, by branch bit and the state it leaves
    branch_point: np.ndarray  # (2, states) float32
    decisions: np.ndarray  # (rows, states) uint8: branch bit of the path that survives in a state
    points: np.ndarray  # (rows, states) float32: its last point


@jit
def _workspace(rows, states, depth):  # type: ignore[no-untyped-def]
    """Allocate a Workspace."""
    pending, history = np.zeros((2, states, depth + 1), F), np.zeros((2, states, depth + 1), np.uint8)
    return Workspace(
        Survivors(np.empty((2, states), F), pending, history),
        np.empty(states, F),
        np.empty((2, states), F),
        np.empty((2, states), F),
        np.empty((rows, states), np.uint8),
        np.empty((rows, states), F),
    )


@jit
def _feed_rows(shift, row_feedback, row, error):  # type: ignore[no-untyped-def]
    """Add to the shifts of all later rows what a row's error asks for; see coupled.RowFeedback."""
    along, later = row_feedback.numbers[row, row + 1 :], shift[row + 1 :]
    scaled = error * row_feedback.scales[row]
    for i in range(len(later)):  # from 0, or numba does not vectorize it
        later[i] += F(along[i]) * scaled


@jit
def _cheapest(cost):  # type: ignore[no-untyped-def]
    """Return the first state of least cost."""
    best = 0
    for state in range(1, len(cost)):
        if cost[state] < cost[best]:
            best = state
    return best


@jit
def _branch(cost, bounds, work):  # type: ignore[no-untyped-def]
    """Find the nearest point of each state's two cosets, and what a path costs with it."""
    for bit in range(2):
        for state in range(len(cost)):
            coset = (state & 1) + 2 * bit
            first = F(coset)
            k = np.rint((work.target[state] - first) * F(0.25))
            k = bounds[coset, 0] if k < bounds[coset, 0] else k
            k = bounds[coset, 1] if k > bounds[coset, 1] else k
            point = k * F(4) + first
            off = work.target[state] - point
            work.branch_point[bit, state] = point
            work.branch_cost[bit, state] = cost[state] + off * off


@jit
def _coupled_lane(column, row_feedback, grid, depth, work, start, stop):  # type: ignore[no-untyped-def]
    """Search rows start .. stop-1; return the costs after the last one. See coupled._search_lane."""
    rows, states = len(column.weight), len(grid.came_from)
    decisions, points, target = work.decisions, work.points, work.target
    cost, next_cost = work.survivors.cost[0], work.survivors.cost[1]
    pending, next_pending = work.survivors.pending[0], work.survivors.pending[1]
    history, next_history = work.survivors.history[0], work.survivors.history[1]
    # One path, in state 0, that asks nothing of the rows to come.
    pending[:] = F(0)
    cost[:] = F(np.inf)
    cost[0] = F(0)
    for row in range(start, stop):
        # A row's target depends on the path: settled rows shift it for all, a path's own last rows for itself.
        weight, step, scale = column.weight[row], column.step[row], row_feedback.scales[row]
        base, inverse = weight + column.correction[row] + column.shift[row], F(1) / step
        for state in range(states):
            target[state] = (base + pending[state, 0]) * inverse
        _branch(cost, grid.bounds, work)
        width, along = min(depth, rows - row - 1), row_feedback.numbers[row, row + 1 :]
        for state in range(states):
            # Of the two branches that meet in a state the cheaper survives, of equal ones that of bit 0.
            from_zero, from_one = grid.came_from[state, 0], grid.came_from[state, 1]
            bit = 1 if work.branch_cost[1, from_one] < work.branch_cost[0, from_zero] else 0
            source = from_one if bit == 1 else from_zero
            point = work.branch_point[bit, source]
            decisions[row, state], points[row, state] = bit, point
            next_cost[state] = work.branch_cost[bit, source]
            # What it asks of the next rows: as before, one row on, and what this row's error adds.
            error = (weight - point * step) * scale
            old, new = pending[source], next_pending[state]
            for i in range(width):
                new[i] = old[i + 1] + F(along[i]) * error
            for i in range(width, depth):
                new[i] = F(0)
            # The states it has been in, the oldest dropped.
            before, after = history[source], next_history[state]
            for i in range(depth):
                after[i] = before[i + 1]
            after[depth] = state
        pending, next_pending = next_pending, pending
        history, next_history = next_history, history
        cost, next_cost = next_cost, cost
        # `depth` rows up, the cheapest path decides: others that differ there are dropped, its error goes to all below.
        settled = row - depth
        if settled >= start:
            kept = history[_cheapest(cost), 0]
            for state in range(states):
                if history[state, 0] != kept:
                    cost[state] = F(np.inf)
            off = column.weight[settled] - points[settled, kept] * column.step[settled]
            _feed_rows(column.shift, row_feedback, settled, off)
    return cost


@jit
def _coupled_column(column, row_feedback, grid, depth, work, error, symbol):  # type: ignore[no-untyped-def]
    """Round one column into `symbol`, with its R in `error`. See coupled.round_trellis."""
    rows = len(column.weight)
    column.shift[:] = F(0)
    for start in range(0, rows, grid.lane_rows):
        stop = min(start + grid.lane_rows, rows)
        # The cheapest path of the lane, read from its end.
        state = _cheapest(_coupled_lane(column, row_feedback, grid, depth, work, start, stop))
        for row in range(stop - 1, start - 1, -1):
            point = work.points[row, state]
            error[row] = column.weight[row] - point * column.step[row]
            state = grid.came_from[state, work.decisions[row, state]]
            symbol[row] = np.int16((point - F(state & 1)) * F(0.5))
        # Its last rows were not settled on the way.
        for row in range(max(start, stop - depth), stop):
            _feed_rows(column.shift, row_feedback, row, error[row])
    for row in range(rows):
        error[row] = error[row] + column.shift[row]


@jit
def round_coupled_trellis(columns, row_feedback, grid, depth, start, stop):  # type: ignore[no-untyped-def]
    """Round columns start .. stop-1 of a panel (panels.Columns), rows coupled, along trellis paths."""
    rows = len(row_feedback.numbers)
    shift, work = np.empty(rows, F), _workspace(rows, len(grid.came_from), depth)
    for j in range(start, stop):
        feed(columns.errors, columns.feedback, start, j)
        error, symbol = columns.errors[j, :rows], columns.symbols[j, :rows]
        step = columns.steps[j if len(columns.steps) > 1 else 0, :rows]
        column = Column(columns.weights[j, :rows], error.copy(), step, shift)
        _coupled_column(column, row_feedback, grid, depth, work, error, symbol)


@jit
def round_coupled_scalar(columns, row_feedback, largest, start, stop):  # type: ignore[no-untyped-def]
    """Round columns start .. stop-1 of a panel (panels.Columns), rows coupled, each to a scalar grid."""
    rows = len(row_feedback.numbers)
    shift = np.empty(rows, F)
    for j in range(start, stop):
        feed(columns.errors, columns.feedback, start, j)
        weight, error, symbol = columns.weights[j], columns.errors[j], columns.symbols[j]
        step = columns.steps[j if len(columns.steps) > 1 else 0]
        shift[:] = F(0)
        for row in range(rows):
            nearest = np.rint((weight[row] + error[row] + shift[row]) / step[row])
            nearest = -largest if nearest < -largest else nearest
            nearest = largest if nearest > largest else nearest
            symbol[row] = np.int16(nearest)
            error[row] = weight[row] - nearest * step[row]
            _feed_rows(shift, row_feedback, row, error[row])
        for row in range(rows):
            error[row] = error[row] + shift[row]
