"""Rounding along anti-diagonals in a script: compiled where numba can be loaded, else in numpy.

Ordinary code that only scripts run (fit_form.py). `diagonal_kernels.py` is faster by vector instructions that it writes
itself; in a script a plain loop over the states is worth its bytes. It does the float32 operations of diagonals.py in
the same order, so the symbols are the same.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from pgolf_post.quantize.gptq.diagonals import F
from pgolf_post.quantize.gptq.trellis import TILE


@lru_cache
def compiled() -> Callable[..., None] | None:
    """Return the compiled `sweep`; None, said aloud, where numba cannot be loaded."""
    try:
        numba: Any = importlib.import_module("numba")
    except Exception:  # a damaged install can fail in any way
        print("no numba: matrices are rounded by numpy, which takes much longer", flush=True)
        return None
    run: Callable[..., None] = numba.njit(nogil=True, error_model="numpy")(sweep)
    return run


def sweep(sheet, bounds, came_from, first, stop):  # type: ignore[no-untyped-def]
    """Round diagonals first .. stop-1 of a Sheet; see diagonals.py."""
    weights, steps, near, near_rows, along, down, errors, residuals, symbols = sheet
    rows, columns = weights.shape
    states = len(came_from)
    points = np.empty((min(rows, columns), 4), F)
    decisions = np.empty((min(rows, columns), states), np.uint8)
    metric = np.empty(4, F)
    cost, after = np.empty(states, F), np.empty(states, F)
    for diagonal in range(first, stop):
        top = max(0, diagonal - columns + 1)
        length = min(rows, diagonal + 1) - top
        # Forward: the cheaper of the two branches into each state survives, of equal ones that of bit 0.
        cost[:] = F(np.inf)
        cost[0] = F(0)
        for place in range(length):
            i = top + place
            j = diagonal - i
            target = (weights[i, j] + along[i, j] + down[j, i]) / steps[i % len(steps), j % steps.shape[1]]
            for d in range(4):
                k = np.rint((target - F(d)) * F(0.25))
                point = max(bounds[d, 0], min(bounds[d, 1], k)) * F(4) + F(d)
                points[place, d] = point
                metric[d] = (target - point) * (target - point)
            for state in range(states):
                zero = cost[came_from[state, 0]] + metric[came_from[state, 0] & 1]
                one = cost[came_from[state, 1]] + metric[came_from[state, 1] & 1 | 2]
                decisions[place, state] = one < zero
                after[state] = one if one < zero else zero
            cost, after = after, cost
        # The cheapest end, of equal ones the lowest state, read backwards.
        state = np.argmin(cost)  # type: ignore[assignment]
        for place in range(length - 1, -1, -1):
            i = top + place
            j = diagonal - i
            bit = decisions[place, state]
            state = came_from[state, bit]
            point = points[place, state & 1 | 2 * bit]
            symbols[i, j] = np.int16((point - F(state & 1)) * F(0.5))
            errors[i, j] = weights[i, j] - point * steps[i % len(steps), j % steps.shape[1]]
        # What each error asks of this tile and the next.
        for i in range(top, top + length):
            j = diagonal - i
            residuals[i, j] = errors[i, j] + down[j, i]
            for place in range(2 * TILE):
                if len(near_rows):
                    down[j, i // TILE * TILE + place] += near_rows[i, place] * errors[i, j]
                along[i, j // TILE * TILE + place] += near[j, place] * residuals[i, j]
