"""Compiled inner loops of a trellis along anti-diagonals (diagonals.py). Imported only where numba can be loaded.

As in kernels.py, each does the operations of its numpy counterpart in the same order on the same values.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pgolf_post.base.numba import jit
from pgolf_post.quantize.gptq.kernels import F
from pgolf_post.quantize.gptq.survivors import step as extend
from pgolf_post.quantize.gptq.survivors import width_of
from pgolf_post.quantize.gptq.trellis import TILE


class Workspace(NamedTuple):
    """Buffers of one diagonal's search, of at most `length` weights."""

    targets: np.ndarray  # (length,) float32: what each weight should become, in steps of the union grid
    points: np.ndarray  # (4, length) float32: each coset's point nearest to the target
    metric: np.ndarray  # (4, length) float32: its squared distance
    decisions: np.ndarray  # (length, states / width) uint8, a bit a state: branch bit of the path that survives in it
    cost: np.ndarray  # (states,) float32, of the cheapest path into a state
    came_from: np.ndarray  # (states, 2) int64: where branch bit 0, and 1, came from
    registers: tuple[int, ...]  # as many as a state has bits


def workspace(length: int, came_from: np.ndarray) -> Workspace:  # (states, 2)
    """Allocate a Workspace."""
    states = len(came_from)
    targets, points, metric = (np.empty((*many, length), F) for many in ((), (4,), (4,)))
    decisions = np.empty((length, states // width_of(states)), np.uint8)
    registers = (0,) * (states.bit_length() - 1)
    return Workspace(targets, points, metric, decisions, np.empty(states, F), came_from, registers)


@jit
def _nearest_points(targets, bounds, points, metric, length):  # type: ignore[no-untyped-def]
    """Write the nearest point of each coset to every weight, and how far away it is."""
    for d in range(4):
        first, least, greatest = F(d), bounds[d, 0], bounds[d, 1]
        for place in range(length):
            k = np.rint((targets[place] - first) * F(0.25))
            k = least if k < least else k
            k = greatest if k > greatest else k
            point = k * F(4) + first
            off = targets[place] - point
            points[d, place] = point
            metric[d, place] = off * off


@jit
def _search(sheet, bounds, work, first_row, diagonal, length):  # type: ignore[no-untyped-def]
    """Find the cheapest path of a diagonal; its errors go into `sheet.errors`, its symbols into `sheet.symbols`."""
    weights, steps, along, down, targets = sheet.weights, sheet.steps, sheet.along, sheet.down, work.targets
    points, metric, cost, decisions, came_from = work.points, work.metric, work.cost, work.decisions, work.came_from
    many_rows, many_columns = len(steps) > 1, steps.shape[1] > 1
    for place in range(length):
        i = first_row + place
        j = diagonal - i
        step = steps[i if many_rows else 0, j if many_columns else 0]
        targets[place] = (weights[i, j] + along[i, j] + down[j, i]) / step
    _nearest_points(targets, bounds, points, metric, length)
    cost[:] = F(np.inf)
    cost[0] = F(0)
    for place in range(length):
        zero, one, two, three = metric[0, place], metric[1, place], metric[2, place], metric[3, place]
        extend(cost, decisions, place, zero, one, two, three, work.registers)
    # The cheapest end, of equal ones the lowest state, read backwards.
    state = 0
    for other in range(1, len(cost)):
        if cost[other] < cost[state]:
            state = other
    symbols, errors = sheet.symbols, sheet.errors
    # A byte of decisions holds those of 2 ** shift states.
    shift = 3 if len(cost) > 8 else len(work.registers) - 1
    mask = (1 << shift) - 1
    for place in range(length - 1, -1, -1):
        i = first_row + place
        j = diagonal - i
        bit = decisions[place, state >> shift] >> (state & mask) & 1
        state = came_from[state, bit]
        z0 = state & 1
        point = points[z0 + 2 * bit, place]
        step = steps[i if many_rows else 0, j if many_columns else 0]
        symbols[i, j] = np.int16((point - F(z0)) * F(0.5))
        errors[i, j] = weights[i, j] - point * step


@jit
def _hand_on(into, row, start, near, source, factor):  # type: ignore[no-untyped-def]
    """Add to one row, from `start` on, a multiple of the feedback of this tile and the next."""
    first = np.uint64(start)
    for place in range(np.uint64(2 * TILE)):
        into[row, first + place] += near[source, place] * factor


@jit
def sweep(sheet, bounds, work, first, stop):  # type: ignore[no-untyped-def]
    """Round diagonals first .. stop-1; see diagonals.py."""
    rows, columns = sheet.weights.shape
    errors, residuals, down, along = sheet.errors, sheet.residuals, sheet.down, sheet.along
    near, near_rows = sheet.near, sheet.near_rows
    coupled = len(near_rows) > 0
    for diagonal in range(first, stop):
        first_row = max(0, diagonal - columns + 1)
        length = min(rows, diagonal + 1) - first_row
        _search(sheet, bounds, work, first_row, diagonal, length)
        for i in range(first_row, first_row + length):
            j = diagonal - i
            error = errors[i, j]
            residual = error + down[j, i]
            residuals[i, j] = residual
            if coupled:
                _hand_on(down, j, i // TILE * TILE, near_rows, i, error)
            _hand_on(along, i, j // TILE * TILE, near, j, residual)
