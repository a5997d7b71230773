"""A trellis along anti-diagonals: feedback from both sides, and a search that nothing couples.

With feedback from both sides (coupled.py) the target of weight (i, j) is w_ij + Σ_l<j F_lj·V_il + Σ_k<i G_ki·E_kj, with
V_ij = E_ij + Σ_k<i G_ki·E_kj. It depends on errors above it and to its left, never on those of its own anti-diagonal:

    columns  0    1    2    3        a path of the trellis
    row 0    ·    ·    ↙    ○        visits (0, d), (1, d - 1), (2, d - 2), …
    row 1    ·    ↙    ○    ○        dots are rounded already,
    row 2    ↙    ○    ○    ○        circles wait for them

So all targets of a diagonal are known before it is searched, and plain Viterbi is exact. Down a column (coupled.py)
they are not: every survivor carries a feedback of its own, which costs ten times as much and settles rows too early. A
path is at most min(rows, columns) long; it starts in state 0, in the first row or in the last column.

Errors are handed on twice: within the 32 × 32 tile of a weight and the next one by the weight itself, beyond them by a
matrix product for the whole tile, as soon as the last of its diagonals is done, which is just when the tile after the
next begins. Columns are visited in their own order, for the decoder must know which weights are neighbours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from pgolf_post.errors import MismatchError
from pgolf_post.quantize.gptq.job import Job
from pgolf_post.quantize.gptq.viterbi import Grid, search

TILE = 32  # rows and columns; 64 costs a quarter more, 16 as much
F = np.float32


class Sheet(NamedTuple):
    """One matrix while it is rounded; (rows, columns) float32 where nothing else is said."""

    weights: np.ndarray
    steps: np.ndarray  # (rows or 1, columns or 1), of the union grid
    feedback: np.ndarray  # (columns, columns) F of the inputs
    row_feedback: np.ndarray  # (rows, rows) G of the outputs; (0, 0): rows are not coupled
    along: np.ndarray  # Σ_l<j F_lj·V_il
    down: np.ndarray  # (columns, rows): Σ_k<i G_ki·E_kj
    errors: np.ndarray  # E
    residuals: np.ndarray  # V
    symbols: np.ndarray  # int16


def round_diagonals(job: Job, fast: bool) -> np.ndarray:  # (out, in) int16
    """Return the symbols of a matrix whose trellis runs along anti-diagonals.

    Raises MismatchError if its factor visits columns in another order than their own.
    """
    sheet, grid = _sheet(job), Grid.of(job.trellis.states if job.trellis else 0, 0, job.limit)
    sweep: Callable[[Sheet, Grid, int, int, int], None] = _compiled_sweep() if fast else _numpy_sweep
    rows, columns = sheet.weights.shape
    diagonals = rows + columns - 1 if rows and columns else 0
    for first in range(0, diagonals, TILE):
        _fold(sheet, first // TILE - 2)
        sweep(sheet, grid, TILE, first, min(first + TILE, diagonals))
    return sheet.symbols


def _sheet(job: Job) -> Sheet:
    if not torch.equal(job.factor.order, torch.arange(len(job.factor.order))):
        raise MismatchError(f"{job.name}: a trellis along diagonals visits columns in their own order")
    weights = job.weight.detach().float().contiguous().numpy()
    row_feedback = np.zeros((0, 0), F) if job.row_feedback is None else job.row_feedback.contiguous().numpy()
    steps, feedback = job.spread(job.steps).float().contiguous().numpy(), job.factor.feedback.contiguous().numpy()
    along, errors, residuals = (np.zeros_like(weights) for _ in range(3))
    down, symbols = np.zeros(weights.shape[::-1], F), np.zeros(weights.shape, np.int16)
    return Sheet(weights, steps, feedback, row_feedback, along, down, errors, residuals, symbols)


def _fold(sheet: Sheet, tiles: int) -> None:
    """Hand on the errors of all tiles (I, J) with I + J = tiles to the tiles after the next, in both directions."""
    rows, columns = sheet.weights.shape
    for number in range(max(0, tiles + 1)):
        top, edge = number * TILE, (tiles - number) * TILE
        above, left = slice(top, top + TILE), slice(edge, edge + TILE)
        below, right = slice(top + 2 * TILE, rows), slice(edge + 2 * TILE, columns)
        if above.start >= rows or left.start >= columns:
            continue
        if len(sheet.row_feedback) and below.start < rows:
            sheet.down[left, below] += sheet.errors[above, left].T @ sheet.row_feedback[above, below]
        if right.start < columns:
            sheet.along[above, right] += sheet.residuals[above, left] @ sheet.feedback[left, right]


def _compiled_sweep() -> Callable[[Sheet, Grid, int, int, int], None]:
    from pgolf_post.quantize.gptq import diagonal_kernels

    sweep: Callable[[Sheet, Grid, int, int, int], None] = diagonal_kernels.sweep
    return sweep


def _numpy_sweep(sheet: Sheet, grid: Grid, tile: int, first: int, stop: int) -> None:
    """Round diagonals first .. stop-1: the kernel's operations in the kernel's order."""
    rows, columns = sheet.weights.shape
    steps, bounds = np.broadcast_to(sheet.steps, sheet.weights.shape), torch.from_numpy(grid.bounds)
    for diagonal in range(first, stop):
        i = np.arange(max(0, diagonal - columns + 1), min(rows, diagonal + 1))
        j = diagonal - i
        targets = (sheet.weights[i, j] + sheet.along[i, j] + sheet.down[j, i]) / steps[i, j]
        points, symbols = (
            path[:, 0].numpy() for path in search(torch.from_numpy(targets)[:, None], len(grid.came_from), bounds)
        )
        sheet.symbols[i, j] = symbols.astype(np.int16)
        sheet.errors[i, j] = sheet.weights[i, j] - points * steps[i, j]
        sheet.residuals[i, j] = sheet.errors[i, j] + sheet.down[j, i]
        for row, column in zip(i, j, strict=True):
            _hand_on(sheet, tile, row, column)


def _hand_on(sheet: Sheet, tile: int, i: int, j: int) -> None:
    """Add to the sums of this tile and of the next what one weight's error asks for."""
    if len(sheet.row_feedback):
        below = slice(i + 1, (i // tile + 2) * tile)
        sheet.down[j, below] += sheet.row_feedback[i, below] * sheet.errors[i, j]
    right = slice(j + 1, (j // tile + 2) * tile)
    sheet.along[i, right] += sheet.feedback[j, right] * sheet.residuals[i, j]
