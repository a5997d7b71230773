"""Compiled inner loops of the entropy coder. Imported only where numba can be loaded.

Each computes the same integers as its numpy counterpart in contexts.py or rans.py, and so gives the same bytes.
"""

from __future__ import annotations

import numpy as np

from pgolf_post.base.numba import jit


@jit
def walk(  # type: ignore[no-untyped-def]
    residuals, symbols, row_shifts, steps, informed,  # of the block, see contexts.Block
    update_shifts, half,  # of the running means: right shift by row, rounding
    log, shrink,  # tables: mean → eighths of an octave, context shift → multiplier
    means,  # (width,) int32, changed in place
    table, lane_rows,  # next states of a trellis down the columns, empty without one
    levels, odds,  # (rows, width) uint8, written; without a table, trellis bits are read
):  # fmt: skip
    """Write the level and the trellis bit of every symbol."""
    (tensors, rows), width = row_shifts.shape, residuals.shape[1]
    columns, state = width // tensors, np.zeros(width, np.uint8)
    for row in range(rows):
        if len(table) and row % lane_rows == 0:
            state[:] = 0
        for tensor in range(tensors):
            row_shift = np.int64(row_shifts[tensor, row] & 127)
            for column in range(tensor * columns, (tensor + 1) * columns):
                # what the column's mean predicts
                shift = (row_shift - steps[row, column]) & 127 if informed else row_shift
                mean = np.int64(means[column])
                levels[row, column] = log[mean] + shift

                # the trellis bit, and the state that the symbol leads to
                if len(table):
                    odds[row, column] = state[column] & 1
                    state[column] = table[2 * np.int64(state[column]) + (symbols[row, column] & 1)]

                # the magnitude, less its shift, moves the mean
                size = 2 * np.int64(residuals[row, column]) + odds[row, column]
                size = min(abs(size) * shrink[shift], np.int64(65535))
                means[column] = mean + ((size - mean + half) >> update_shifts[row])


@jit
def encode(symbols, levels, odds, classes, freqs, starts, width, total, states, words, escaped):  # type: ignore[no-untyped-def]
    """Code a block backwards: words fill their buffer from its end, escapes from its start.

    Returns the index of the first word, and the number of escapes.
    """
    rows, columns = symbols.shape
    lanes, at, wild = len(states), len(words), 0
    which = np.empty(columns, np.int64)
    for row in range(rows - 1, -1, -1):
        # each symbol's place in its frequency table; what the table lacks is escaped
        for column in range(columns):
            context = (2 * np.int64(classes[levels[row, column]]) + odds[row, column]) * width
            entry = np.int64(symbols[row, column]) + width // 2
            if entry < 1 or entry >= width or freqs[context + entry] == 0:
                escaped[wild] = symbols[row, column]
                wild += 1
                entry = 0
            which[column] = context + entry

        # one lane per symbol, backwards; a state moves its low word out before it would overflow
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
