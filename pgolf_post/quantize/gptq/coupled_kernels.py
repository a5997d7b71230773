"""Compiled inner loops of rounding with coupled rows (coupled.py). Imported only where numba is installed.

As in kernels.py, each does the operations of its numpy counterpart in the same order on the same values.
"""

from __future__ import annotations

import numpy as np

from pgolf_post.quantize.gptq.kernels import F, feed, jit


@jit
def _feed_rows(shift, row_feedback, scales, row, error):  # type: ignore[no-untyped-def]
    """Add to the shifts of all later rows what a row's error asks for; see coupled.RowFeedback."""
    along, later, scaled = row_feedback[row, row + 1 :], shift[row + 1 :], error * scales[row]
    for i in range(len(later)):  # from 0, or numba does not vectorize it
        later[i] += F(along[i]) * scaled


@jit
def _cheapest(cost):  # type: ignore[no-untyped-def]
    """The first state of least cost."""
    best = 0
    for state in range(1, len(cost)):
        if cost[state] < cost[best]:
            best = state
    return best


@jit
def _branch(target, cost, bounds, branch_cost, branch_point):  # type: ignore[no-untyped-def]
    """The nearest point of each state's two cosets, (2, states), and what a path costs with it."""
    for bit in range(2):
        for state in range(len(cost)):
            coset = (state & 1) + 2 * bit
            first = F(coset)
            k = np.rint((target[state] - first) * F(0.25))
            k = bounds[coset, 0] if k < bounds[coset, 0] else k
            k = bounds[coset, 1] if k > bounds[coset, 1] else k
            point = k * F(4) + first
            off = target[state] - point
            branch_point[bit, state] = point
            branch_cost[bit, state] = cost[state] + off * off


@jit
def _coupled_workspace(rows, states, depth):  # type: ignore[no-untyped-def]
    pending, history = np.zeros((2, states, depth + 1), F), np.zeros((2, states, depth + 1), np.uint8)
    branches = np.empty((2, 2, states), F)
    paths = np.empty((rows, states), np.uint8), np.empty((rows, states), F)
    return pending, history, np.empty((2, states), F), np.empty(states, F), branches, paths


@jit
def _coupled_lane(  # type: ignore[no-untyped-def]
    weight, correction, step, row_feedback, scales, came_from, bounds, depth, shift, work, start, stop
):
    """Costs after the lane's last row; see coupled._search_lane."""
    pendings, histories, costs, target, (branch_cost, branch_point), (decisions, points) = work
    rows, states = len(weight), len(came_from)
    pending, history, cost = pendings[0], histories[0], costs[0]
    next_pending, next_history, next_cost = pendings[1], histories[1], costs[1]
    pending[:] = F(0)
    cost[:] = F(np.inf)
    cost[0] = F(0)
    for row in range(start, stop):
        base, inverse = weight[row] + correction[row] + shift[row], F(1) / step[row]
        for state in range(states):
            target[state] = (base + pending[state, 0]) * inverse
        _branch(target, cost, bounds, branch_cost, branch_point)
        width, along = min(depth, rows - row - 1), row_feedback[row, row + 1 :]
        for state in range(states):
            from_zero, from_one = came_from[state, 0], came_from[state, 1]
            bit = 1 if branch_cost[1, from_one] < branch_cost[0, from_zero] else 0
            source = from_one if bit == 1 else from_zero
            point = branch_point[bit, source]
            decisions[row, state], points[row, state] = bit, point
            next_cost[state] = branch_cost[bit, source]
            error = (weight[row] - point * step[row]) * scales[row]
            old, new = pending[source], next_pending[state]
            for i in range(width):
                new[i] = old[i + 1] + F(along[i]) * error
            for i in range(width, depth):
                new[i] = F(0)
            before, after = history[source], next_history[state]
            for i in range(depth):
                after[i] = before[i + 1]
            after[depth] = state
        pending, next_pending = next_pending, pending
        history, next_history = next_history, history
        cost, next_cost = next_cost, cost
        settled = row - depth
        if settled >= start:
            kept = history[_cheapest(cost), 0]
            for state in range(states):
                if history[state, 0] != kept:
                    cost[state] = F(np.inf)
            off = weight[settled] - points[settled, kept] * step[settled]
            _feed_rows(shift, row_feedback, scales, settled, off)
    return cost


@jit
def _coupled_column(  # type: ignore[no-untyped-def]
    weight, error, step, row_feedback, scales, came_from, bounds, lane_rows, depth, shift, work, symbol
):
    """One column; `error` holds its correction before, its R after. See coupled.round_trellis."""
    rows = len(weight)
    decisions, points = work[-1]
    correction = error.copy()
    shift[:] = F(0)
    for start in range(0, rows, lane_rows):
        stop = min(start + lane_rows, rows)
        cost = _coupled_lane(
            weight, correction, step, row_feedback, scales, came_from, bounds, depth, shift, work, start, stop
        )
        state = _cheapest(cost)
        for row in range(stop - 1, start - 1, -1):
            point = points[row, state]
            error[row] = weight[row] - point * step[row]
            state = came_from[state, decisions[row, state]]
            symbol[row] = np.int16((point - F(state & 1)) * F(0.5))
        for row in range(max(start, stop - depth), stop):
            _feed_rows(shift, row_feedback, scales, row, error[row])
    for row in range(rows):
        error[row] = error[row] + shift[row]


@jit
def round_coupled_trellis(  # type: ignore[no-untyped-def]
    weights, steps, errors, symbols, feedback, row_feedback, scales, came_from, bounds, lane_rows, depth, start, stop
):
    """Columns start .. stop-1 with feedback from both sides; the first entries of a column are its rows."""
    rows = len(row_feedback)
    shift, work = np.empty(rows, F), _coupled_workspace(rows, len(came_from), depth)
    for j in range(start, stop):
        feed(errors, feedback, start, j)
        step = steps[j if len(steps) > 1 else 0, :rows]
        _coupled_column(
            weights[j, :rows], errors[j, :rows], step, row_feedback, scales, came_from, bounds, lane_rows, depth, shift,
            work, symbols[j, :rows],
        )  # fmt: skip


@jit
def round_coupled_scalar(  # type: ignore[no-untyped-def]
    weights, steps, errors, symbols, feedback, row_feedback, scales, largest, start, stop
):
    """The same on a scalar grid."""
    rows = len(row_feedback)
    shift = np.empty(rows, F)
    for j in range(start, stop):
        feed(errors, feedback, start, j)
        weight, error, step, symbol = weights[j], errors[j], steps[j if len(steps) > 1 else 0], symbols[j]
        shift[:] = F(0)
        for row in range(rows):
            nearest = np.rint((weight[row] + error[row] + shift[row]) / step[row])
            nearest = -largest if nearest < -largest else nearest
            nearest = largest if nearest > largest else nearest
            symbol[row] = np.int16(nearest)
            error[row] = weight[row] - nearest * step[row]
            _feed_rows(shift, row_feedback, scales, row, error[row])
        for row in range(rows):
            error[row] = error[row] + shift[row]
