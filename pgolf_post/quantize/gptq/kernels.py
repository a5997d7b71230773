"""Compiled inner loops of GPTQ and of the trellis search. Imported only where numba is installed.

Each does the operations of its torch counterpart in the same order on the same float32 values, without contraction or
reassociation, and so gives the same symbols. Literals are spelled float32: a float64 one would widen the arithmetic.
"""

from __future__ import annotations

import numba
import numpy as np

F = np.float32
jit = numba.njit(nogil=True, cache=True, error_model="numpy")


@jit
def _coset_points(targets, bounds, points, rows, lanes):  # type: ignore[no-untyped-def]
    """The nearest point of each coset, (rows, 4, lanes)."""
    for row in range(rows):
        for d in range(4):
            first, least, greatest = F(d), bounds[d, 0], bounds[d, 1]
            for lane in range(lanes):
                k = np.rint((targets[row, lane] - first) * F(0.25))
                k = least if k < least else k
                k = greatest if k > greatest else k
                points[row, d, lane] = k * F(4) + first


@jit
def _forward(targets, points, came_from, cost, next_cost, metric, decisions):  # type: ignore[no-untyped-def]
    """Costs of the cheapest path into every state after the last row; `decisions` hold its branch bits."""
    rows, lanes = targets.shape
    states = len(came_from)
    for state in range(states):
        for lane in range(lanes):
            cost[state, lane] = F(0) if state == 0 else F(np.inf)
    for row in range(rows):
        for d in range(4):
            for lane in range(lanes):
                error = targets[row, lane] - points[row, d, lane]
                metric[d, lane] = error * error
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
def _trace_back(cost, points, came_from, decisions, chosen, symbols):  # type: ignore[no-untyped-def]
    """Follow each lane's cheapest path from its end to its start."""
    rows, lanes = symbols.shape
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
def _search(targets, came_from, bounds, work, chosen, symbols):  # type: ignore[no-untyped-def]
    points, cost, next_cost, metric, decisions = work
    _coset_points(targets, bounds, points, targets.shape[0], targets.shape[1])
    cost = _forward(targets, points, came_from, cost, next_cost, metric, decisions)
    _trace_back(cost, points, came_from, decisions, chosen, symbols)


@jit
def _workspace(rows, lanes, states):  # type: ignore[no-untyped-def]
    return (
        np.empty((rows, 4, lanes), F),
        np.empty((states, lanes), F),
        np.empty((states, lanes), F),
        np.empty((4, lanes), F),
        np.empty((rows, states, lanes), np.uint8),
    )


@jit
def search(targets, came_from, bounds):  # type: ignore[no-untyped-def]
    """The symbols (rows, lanes) int16 of the cheapest paths; see viterbi.search."""
    rows, lanes = targets.shape
    chosen, symbols = np.empty((rows, lanes), F), np.empty((rows, lanes), np.int16)
    _search(targets, came_from, bounds, _workspace(rows, lanes, len(came_from)), chosen, symbols)
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
def round_scalar(weights, steps, shrink, errors, symbols, feedback, largest, start, stop):  # type: ignore[no-untyped-def]
    """Round columns start .. stop-1 to their grids; see rounding.py."""
    for j in range(start, stop):
        feed(errors, feedback, start, j)
        weight, error, symbol = weights[j], errors[j], symbols[j]
        step, factor = steps[j if len(steps) > 1 else 0], shrink[j if len(shrink) > 1 else 0]
        for row in range(len(weight)):
            nearest = np.rint((weight[row] + error[row]) / step[row] * factor[row])
            nearest = -largest if nearest < -largest else nearest
            nearest = largest if nearest > largest else nearest
            symbol[row] = np.int16(nearest)
            error[row] = weight[row] - nearest * step[row]


@jit
def round_trellis(  # type: ignore[no-untyped-def]
    weights, steps, shrink, errors, symbols, feedback, came_from, bounds, rows, lanes, start, stop
):
    """The same with a trellis down the rows; the first rows·lanes entries of a column are (rows, lanes)."""
    used = rows * lanes
    targets, chosen = np.empty(used, F), np.empty((rows, lanes), F)
    points = chosen.reshape(used)
    work = _workspace(rows, lanes, len(came_from))
    for j in range(start, stop):
        feed(errors, feedback, start, j)
        weight, error = weights[j], errors[j]
        step, factor = steps[j if len(steps) > 1 else 0], shrink[j if len(shrink) > 1 else 0]
        for row in range(used):
            targets[row] = (weight[row] + error[row]) / step[row] * factor[row]
        found = symbols[j, :used].reshape(rows, lanes)
        _search(targets.reshape(rows, lanes), came_from, bounds, work, chosen, found)
        for row in range(used):
            error[row] = weight[row] - points[row] * step[row]
