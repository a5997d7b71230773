"""Compiled inner loops of GPTQ and of the trellis search. Imported only where numba can be loaded.

Each does the operations of its torch counterpart in the same order on the same float32 values, without contraction or
reassociation, and so gives the same symbols. Literals are spelled float32: a float64 one would widen the arithmetic.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pgolf_post.base.numba import jit

F = np.float32


class Workspace(NamedTuple):
    """Buffers of a search of `lanes` lanes side by side."""

    points: np.ndarray  # (rows, 4, lanes) float32: each coset's point nearest to the target
    cost: np.ndarray  # (states, lanes) float32, of the cheapest path into a state
    next_cost: np.ndarray  # (states, lanes) float32
    metric: np.ndarray  # (4, lanes) float32: squared distance of each coset's point
    decisions: np.ndarray  # (rows, states, lanes) uint8: branch bit of the path that survives in a state
    chosen: np.ndarray  # (rows, lanes) float32: points of the cheapest path


@jit
def _workspace(rows, lanes, states):  # type: ignore[no-untyped-def]
    """Allocate a Workspace."""
    return Workspace(
        np.empty((rows, 4, lanes), F),
        np.empty((states, lanes), F),
        np.empty((states, lanes), F),
        np.empty((4, lanes), F),
        np.empty((rows, states, lanes), np.uint8),
        np.empty((rows, lanes), F),
    )


@jit
def _coset_points(targets, bounds, points):  # type: ignore[no-untyped-def]
    """Write the nearest point of each coset into `points` (rows, 4, lanes)."""
    rows, lanes = targets.shape
    for row in range(rows):
        for d in range(4):
            first, least, greatest = F(d), bounds[d, 0], bounds[d, 1]
            for lane in range(lanes):
                k = np.rint((targets[row, lane] - first) * F(0.25))
                k = least if k < least else k
                k = greatest if k > greatest else k
                points[row, d, lane] = k * F(4) + first


@jit
def _forward(targets, came_from, work):  # type: ignore[no-untyped-def]
    """Return the costs of the cheapest path into every state after the last row; decisions stay in `work`."""
    rows, lanes = targets.shape
    states = len(came_from)
    points, metric, decisions = work.points, work.metric, work.decisions
    cost, next_cost = work.cost, work.next_cost
    # Every lane starts in state 0.
    for state in range(states):
        for lane in range(lanes):
            cost[state, lane] = F(0) if state == 0 else F(np.inf)
    for row in range(rows):
        # What a branch costs depends on its coset alone.
        for d in range(4):
            for lane in range(lanes):
                error = targets[row, lane] - points[row, d, lane]
                metric[d, lane] = error * error
        # Two branches meet in a state; the cheaper survives, of equal ones that of bit 0.
        for state in range(states):
            from_zero, from_one = came_from[state, 0], came_from[state, 1]
            z0 = from_zero & 1
            for lane in range(lanes):
                zero = cost[from_zero, lane] + metric[z0, lane]
                one = cost[from_one, lane] + metric[z0 + 2, lane]
                decisions[row, state, lane] = one < zero
                next_cost[state, lane] = one if one < zero else zero
        cost, next_cost = next_cost, cost
    return cost


@jit
def _trace_back(cost, came_from, work, symbols):  # type: ignore[no-untyped-def]
    """Follow each lane's cheapest path from its end to its start; of equally cheap ends take the lowest state."""
    rows, lanes = symbols.shape
    points, decisions, chosen = work.points, work.decisions, work.chosen
    for lane in range(lanes):
        state = 0
        for other in range(1, len(came_from)):
            if cost[other, lane] < cost[state, lane]:
                state = other
        for row in range(rows - 1, -1, -1):
            bit = decisions[row, state, lane]
            state = came_from[state, bit]
            z0 = state & 1
            point = points[row, z0 + 2 * bit, lane]
            chosen[row, lane] = point
            symbols[row, lane] = np.int16((point - F(z0)) * F(0.5))


@jit
def _search(targets, grid, work, symbols):  # type: ignore[no-untyped-def]
    """Search all lanes of `targets` (rows, lanes): symbols into `symbols`, points into `work.chosen`."""
    _coset_points(targets, grid.bounds, work.points)
    cost = _forward(targets, grid.came_from, work)
    _trace_back(cost, grid.came_from, work, symbols)


@jit
def search(targets, grid):  # type: ignore[no-untyped-def]
    """Return the symbols (rows, lanes) int16 of the cheapest paths; see viterbi.search."""
    rows, lanes = targets.shape
    symbols = np.empty((rows, lanes), np.int16)
    _search(targets, grid, _workspace(rows, lanes, len(grid.came_from)), symbols)
    return symbols


@jit
def feed(errors, feedback, start, j):  # type: ignore[no-untyped-def]
    """Add to column j's correction what the errors of columns start .. j-1 of its block ask for."""
    correction = errors[j]
    for k in range(start, j):
        error, weight = errors[k], feedback[k, j]
        for row in range(len(correction)):
            correction[row] += weight * error[row]


@jit
def round_scalar(columns, largest, start, stop):  # type: ignore[no-untyped-def]
    """Round columns start .. stop-1 of a panel (panels.Columns) to their grids; see columns.py."""
    for j in range(start, stop):
        feed(columns.errors, columns.feedback, start, j)
        weight, error, symbol = columns.weights[j], columns.errors[j], columns.symbols[j]
        step = columns.steps[j if len(columns.steps) > 1 else 0]
        for row in range(len(weight)):
            nearest = np.rint((weight[row] + error[row]) / step[row])
            nearest = -largest if nearest < -largest else nearest
            nearest = largest if nearest > largest else nearest
            symbol[row] = np.int16(nearest)
            error[row] = weight[row] - nearest * step[row]


@jit
def round_trellis(columns, grid, lanes, start, stop):  # type: ignore[no-untyped-def]
    """Round columns start .. stop-1 along trellis paths; a column's first entries are (grid.lane_rows, lanes)."""
    used = grid.lane_rows * lanes
    targets = np.empty(used, F)
    work = _workspace(grid.lane_rows, lanes, len(grid.came_from))
    points = work.chosen.reshape(used)
    for j in range(start, stop):
        # What the column should become, in steps of the union grid.
        feed(columns.errors, columns.feedback, start, j)
        weight, error = columns.weights[j], columns.errors[j]
        step = columns.steps[j if len(columns.steps) > 1 else 0]
        for row in range(used):
            targets[row] = (weight[row] + error[row]) / step[row]
        # The cheapest path of each lane, and the error it leaves.
        symbols = columns.symbols[j, :used].reshape(grid.lane_rows, lanes)
        _search(targets.reshape(grid.lane_rows, lanes), grid, work, symbols)
        for row in range(used):
            error[row] = weight[row] - points[row] * step[row]
