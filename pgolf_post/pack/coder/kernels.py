"""Compiled inner loops of the entropy coder. Imported only where numba is installed.

Each does what its numpy counterpart does (contexts.py, rans.py), integer by integer, and so gives the same bytes.
"""

from __future__ import annotations

import numba
import numpy as np

jit = numba.njit(nogil=True, cache=True, error_model="numpy")


@jit
def walk(residuals, symbols, stored, steps, informed, shifts, half, log, shrink, means, table, lane_rows, levels, odds):  # type: ignore[no-untyped-def]
    """Every symbol's level and trellis bit. `table` holds the next states; empty: there is no trellis."""
    (tensors, rows), width = stored.shape, residuals.shape[1]
    columns, state = width // tensors, np.zeros(width, np.uint8)
    for row in range(rows):
        if len(table) and row % lane_rows == 0:
            state[:] = 0
        for tensor in range(tensors):
            own = np.int64(stored[tensor, row] & 127)
            for column in range(tensor * columns, (tensor + 1) * columns):
                scale = (own - steps[row, column]) & 127 if informed else own
                mean = np.int64(means[column])
                levels[row, column] = log[mean] + scale
                size = 2 * np.int64(residuals[row, column])
                if len(table):
                    odd = state[column] & 1
                    odds[row, column] = odd
                    size += odd
                    state[column] = table[2 * np.int64(state[column]) + (symbols[row, column] & 1)]
                size = min(abs(size) * shrink[scale], np.int64(65535))
                means[column] = mean + ((size - mean + half) >> shifts[row])


@jit
def encode(symbols, levels, odds, classes, freqs, starts, width, total, states, words, escaped):  # type: ignore[no-untyped-def]
    """Code a block backwards: words fill their buffer from its end, escapes from its start.

    Returns where the words begin, and the number of escapes.
    """
    rows, columns = symbols.shape
    lanes, at, wild = len(states), len(words), 0
    which = np.empty(columns, np.int64)
    for row in range(rows - 1, -1, -1):
        for column in range(columns):
            context = (2 * np.int64(classes[levels[row, column]]) + odds[row, column]) * width
            entry = np.int64(symbols[row, column]) + width // 2
            if entry < 1 or entry >= width or freqs[context + entry] == 0:
                escaped[wild] = symbols[row, column]
                wild += 1
                entry = 0
            which[column] = context + entry
        for column in range(columns - 1, -1, -1):
            freq, lane = freqs[which[column]], column % lanes
            state = states[lane]
            if state >= freq << 20:
                at -= 1
                words[at] = state & 0xFFFF
                state >>= 16
            quotient = np.int64(np.float64(state) / np.float64(freq))  # exact: state < 2^32, freq ≤ 2^12
            states[lane] = state + quotient * (total - freq) + starts[which[column]]
    return at, wild
