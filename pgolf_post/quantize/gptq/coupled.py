"""Rounding a column whose rows are coupled: error feedback from both sides, through a trellis.

The loss that errors E (out, in) of a matrix cause is ½·tr(C·E·M·Eᵀ), C the second moment of its outputs' gradients and
M that of its inputs. With C = F·D·Fᵀ (F upper triangular, ones on its diagonal, D diagonal) it is Σ_i D_i·R_i·M·R_iᵀ
of R = FᵀE: row i counts by what is left of it once the rows after it adapt to its errors, R_i = E_i + Σ_k<i F_ki·E_k.
So while GPTQ feeds each column's R forward into later columns, each row's E goes into the rows below it (LDLQ on both
sides, as in YAQA, arXiv 2505.22988).

A trellis decides on a whole column at once, and a row's target now depends on the decisions above it. Each survivor
of the Viterbi search therefore carries what its own last decisions, `depth_of` rows of them, ask of the rows to come
(per-survivor processing, Raheli et al. 1995). What lies further back is settled: the cheapest survivor says what the
row that far above becomes, survivors that disagree are dropped, and its error goes into all later rows.

Every column reads all of F, for thousands of rows more than a cache holds, so it is kept as 16-bit integers with one
scale per row: exact to 2e-5 of the row's largest entry.

Columns are searched on the CPU, one row at a time: compiled where numba can be loaded (coupled_kernels.py), else in
numpy, some hundred times slower, with the same float32 operations in the same order and so the same symbols. A scalar
grid needs no search: its rows are rounded one after the other.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pgolf_post.quantize.gptq.viterbi import Grid

F = np.float32


def depth_of(states: int) -> int:
    """Return after how many rows survivors nearly always agree: 10 × the register bits; five cost 1 %, two 6 %."""
    return max(1, 10 * (states - 1).bit_length())


class RowFeedback(NamedTuple):
    """F above its diagonal as integers: F_ki = numbers_ki · scales_k."""

    numbers: np.ndarray  # (rows, rows) int16
    scales: np.ndarray  # (rows,) float32

    @classmethod
    def of(cls, feedback: np.ndarray) -> RowFeedback:  # (rows, rows) float32 F
        """Round F to 16-bit integers."""
        above = np.triu(feedback, 1)
        scales = np.maximum(np.abs(above).max(1, initial=0) / F(32767), np.finfo(F).tiny)
        return cls(np.rint(above / scales[:, None]).astype(np.int16), scales.astype(F))

    def add(self, shift: np.ndarray, row: int, error: np.float32) -> None:  # shift: (rows,) float32
        """Add to the shifts of all later rows what a row's error asks for."""
        shift[row + 1 :] += self.numbers[row, row + 1 :].astype(F) * (error * self.scales[row])


def round_scalar(
    weight: np.ndarray,  # (rows,) float32, as all of these
    correction: np.ndarray,  # (rows,) what errors of earlier columns ask for
    step: np.ndarray,  # (rows,)
    row_feedback: RowFeedback,
    largest: np.float32,
) -> tuple[np.ndarray, np.ndarray]:  # (rows,) int16 symbols, (rows,) float32 R
    """Round one column to a scalar grid, row after row."""
    shift, symbols = np.zeros_like(weight), np.zeros(len(weight), np.int16)
    residual = np.empty_like(weight)
    for row in range(len(weight)):
        target = (weight[row] + correction[row] + shift[row]) / step[row]
        symbol = np.clip(np.rint(target), -largest, largest)
        residual[row] = weight[row] - symbol * step[row]
        symbols[row] = symbol
        row_feedback.add(shift, row, residual[row])
    return symbols, residual + shift


def round_trellis(
    weight: np.ndarray,  # (rows,) float32, as in round_scalar
    correction: np.ndarray,  # (rows,)
    step: np.ndarray,  # (rows,) of the union grid
    row_feedback: RowFeedback,
    grid: Grid,
) -> tuple[np.ndarray, np.ndarray]:  # (rows,) int16 symbols, (rows,) float32 R
    """Round one column along the cheapest path that the survivors leave, lane after lane."""
    rows = len(weight)
    shift, symbols = np.zeros_like(weight), np.zeros(rows, np.int16)
    residual = np.empty_like(weight)
    for start in range(0, rows, grid.lane_rows):
        lane = slice(start, min(start + grid.lane_rows, rows))
        points, symbols[lane] = _search_lane(weight, correction, shift, step, row_feedback, grid, lane)
        residual[lane] = weight[lane] - points * step[lane]
        # The lane's last rows were not settled on the way.
        for row in range(max(lane.start, lane.stop - depth_of(len(grid.came_from))), lane.stop):
            row_feedback.add(shift, row, residual[row])
    return symbols, residual + shift


def _search_lane(
    weight: np.ndarray,
    correction: np.ndarray,
    shift: np.ndarray,  # (rows,) what settled rows above ask for; grows
    step: np.ndarray,
    row_feedback: RowFeedback,
    grid: Grid,
    lane: slice,
) -> tuple[np.ndarray, np.ndarray]:  # (lane rows,) float32 points, (lane rows,) int16 symbols
    """Search one lane, all survivors of a row at once."""
    came_from, states = grid.came_from, len(grid.came_from)
    every, first = np.arange(states), (np.arange(states) & 1).astype(F)
    depth = depth_of(states)
    # One path, in state 0, that asks nothing of the rows to come.
    cost = np.where(every == 0, F(0), F(np.inf)).astype(F)
    pending = np.zeros((states, depth + 1), F)  # what a survivor asks of the next rows; the last is always 0
    history = np.zeros((states, depth + 1), np.int64)  # the states it has been in
    decisions, points = [], []
    for row in range(lane.start, lane.stop):
        # A row's target depends on the path: settled rows shift it for all, a path's own last rows for itself.
        inverse = F(1) / step[row]
        target = (weight[row] + correction[row] + shift[row] + pending[:, 0]) * inverse
        branches = [_nearest(target, cost, first + F(2 * bit), every & 1 | 2 * bit, grid.bounds) for bit in (0, 1)]
        # Of the two branches that meet in a state the cheaper survives, of equal ones that of bit 0.
        one = branches[1][1][came_from[:, 1]] < branches[0][1][came_from[:, 0]]
        source = np.where(one, came_from[:, 1], came_from[:, 0])
        point = np.where(one, branches[1][0][source], branches[0][0][source])
        cost = np.where(one, branches[1][1][source], branches[0][1][source])
        decisions.append(one)
        points.append(point)
        # What a survivor asks of the next rows: as before, one row on, and what this row's error adds.
        width = min(depth, len(weight) - row - 1)
        errors = (weight[row] - point * step[row]) * row_feedback.scales[row]
        ahead = row_feedback.numbers[row, row + 1 : row + 1 + width].astype(F) * errors[:, None]
        previous, pending = pending[source, 1 : width + 1], np.zeros_like(pending)
        pending[:, :width] = previous + ahead
        history = np.concatenate([history[source, 1:], every[:, None]], axis=1)
        # `depth` rows up, the cheapest path decides: others that differ there are dropped, its error goes to all below.
        settled = row - depth
        if settled >= lane.start:
            state = history[cost.argmin(), 0]
            cost = np.where(history[:, 0] == state, cost, F(np.inf))
            error = weight[settled] - points[settled - lane.start][state] * step[settled]
            row_feedback.add(shift, settled, error)
    return _trace_back(int(cost.argmin()), decisions, points, came_from)


def _nearest(
    target: np.ndarray,  # (states,)
    cost: np.ndarray,  # (states,) so far
    first: np.ndarray,  # (states,) float32: the coset's least point that is not negative
    coset: np.ndarray,  # (states,) int
    bounds: np.ndarray,  # (4, 2)
) -> tuple[np.ndarray, np.ndarray]:  # (states,) the coset's nearest point, (states,) cost with it
    """Extend every survivor by its nearest point of one coset."""
    multiple = np.clip(np.rint((target - first) * F(0.25)), bounds[coset, 0], bounds[coset, 1])
    point = multiple * F(4) + first
    off = target - point
    return point, cost + off * off


def _trace_back(
    state: int, decisions: list[np.ndarray], points: list[np.ndarray], came_from: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Read the path that ends in a state backwards: its points and symbols, (lane rows,) each."""
    rows = len(points)
    chosen, symbols = np.empty(rows, F), np.empty(rows, np.int16)
    for row in reversed(range(rows)):
        chosen[row] = points[row][state]
        state = came_from[state, int(decisions[row][state])]
        symbols[row] = (chosen[row] - F(state & 1)) * F(0.5)
    return chosen, symbols
