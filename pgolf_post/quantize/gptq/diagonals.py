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

Errors are handed on three times: within the 32 × 32 tile of a weight and the next one by the weight itself; beyond them
by a matrix product for the whole tile, as soon as the last of its diagonals is done, which is just when the tile after
the next begins; and likewise by blocks of 4 × 4 tiles, beyond a block and the next. Columns are visited in their own
order, for the decoder must know which weights are neighbours. What a weight reads and writes fits a cache: feedback of
64 places a row, sums whose rows are no power of two apart.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pgolf_post.errors import MismatchError
from pgolf_post.quantize.gptq.job import Job
from pgolf_post.quantize.gptq.trellis import TILE
from pgolf_post.quantize.gptq.viterbi import Grid, search

BLOCK = 4 * TILE  # larger matrix products take half the time
F = np.float32


class Sheet(NamedTuple):
    """One matrix while it is rounded; (rows, columns) float32 where nothing else is said."""

    weights: np.ndarray
    steps: np.ndarray  # (rows or 1, columns or 1), of the union grid
    near: np.ndarray  # (columns, 2 * TILE): F of a column's own tile and the next, 0 up to the column itself
    near_rows: np.ndarray  # (rows, 2 * TILE), the same of G; (0, 2 * TILE): rows are not coupled
    along: np.ndarray  # (rows, columns + up to 3 tiles): Σ_l<j F_lj·V_il
    down: np.ndarray  # (columns, rows + up to 3 tiles): Σ_k<i G_ki·E_kj
    errors: np.ndarray  # E
    residuals: np.ndarray  # V
    symbols: np.ndarray  # int16


Sweep = Callable[[Sheet, int, int], None]  # rounds diagonals first .. stop-1


def round_diagonals(job: Job, fast: bool) -> np.ndarray:  # (out, in) int16
    """Return the symbols of a matrix whose trellis runs along anti-diagonals.

    Raises MismatchError if its factor visits columns in another order than their own.
    """
    sheet, grid = _sheet(job), Grid.of(job.trellis.states if job.trellis else 0, 0, job.limit)
    rows, columns = sheet.weights.shape
    sweep: Sweep = _compiled_sweep(grid, min(rows, columns)) if fast else partial(_numpy_sweep, grid)
    diagonals = rows + columns - 1 if rows and columns else 0
    for first in range(0, diagonals, TILE):
        for size, within in ((BLOCK, max(rows, columns)), (TILE, BLOCK)):
            if first % size == 0:
                _fold(sheet, job.factor.feedback, job.row_feedback, first // size - 2, size, within)
        sweep(sheet, first, min(first + TILE, diagonals))
    return sheet.symbols


def _sheet(job: Job) -> Sheet:
    if not torch.equal(job.factor.order, torch.arange(len(job.factor.order))):
        raise MismatchError(f"{job.name}: a trellis along diagonals visits columns in their own order")
    weights = job.weight.detach().float().contiguous().numpy()
    steps = job.spread(job.steps).float().contiguous().numpy()
    near = _near(job.factor.feedback)
    near_rows = np.zeros((0, 2 * TILE), F) if job.row_feedback is None else _near(job.row_feedback)
    errors, residuals = np.zeros_like(weights), np.zeros_like(weights)
    rows, columns = weights.shape
    along, down = np.zeros((rows, _padded(columns)), F), np.zeros((columns, _padded(rows)), F)
    return Sheet(weights, steps, near, near_rows, along, down, errors, residuals, np.zeros(weights.shape, np.int16))


def _near(feedback: Tensor) -> np.ndarray:  # (size, size) → (size, 2 * TILE)
    """Return of each row what lies right of the diagonal, in the diagonal's tile and the next."""
    near, above = np.zeros((len(feedback), 2 * TILE), F), np.triu(feedback.numpy(), 1)
    for start in range(0, len(near), TILE):
        window = above[start : start + TILE, start : start + 2 * TILE]
        near[start : start + TILE, : window.shape[1]] = window
    return near


def _padded(size: int) -> int:
    """Return the room that a row of `size` sums needs: the last tile whole, one after it, and no power of two."""
    tiles = -(-size // TILE) + 1
    return (tiles + (tiles + 1) % 2) * TILE


def _fold(sheet: Sheet, feedback: Tensor, row_feedback: Tensor | None, tiles: int, size: int, within: int) -> None:
    """Hand on the errors of all tiles (I, J) with I + J = tiles to the tiles after the next, in both directions.

    Tiles have `size` rows and columns. Those after the next end with the block after a tile's own, of `within` of them.
    """
    rows, columns = sheet.weights.shape
    along, down = torch.from_numpy(sheet.along), torch.from_numpy(sheet.down)
    errors, residuals = torch.from_numpy(sheet.errors), torch.from_numpy(sheet.residuals)
    for number in range(max(0, tiles + 1)):
        top, edge = number * size, (tiles - number) * size
        if top >= rows or edge >= columns:
            continue
        above, left = slice(top, min(top + size, rows)), slice(edge, min(edge + size, columns))
        below = slice(top + 2 * size, min((top // within + 2) * within, rows))
        right = slice(edge + 2 * size, min((edge // within + 2) * within, columns))
        if row_feedback is not None and below.start < below.stop:
            down[left, below].addmm_(errors[above, left].T, row_feedback[above, below])
        if right.start < right.stop:
            along[above, right].addmm_(residuals[above, left], feedback[left, right])


def _compiled_sweep(grid: Grid, length: int) -> Sweep:
    from pgolf_post.quantize.gptq import diagonal_kernels as kernels

    work = kernels.workspace(length, grid.came_from)
    return lambda sheet, first, stop: kernels.sweep(sheet, grid.bounds, work, first, stop)


def _numpy_sweep(grid: Grid, sheet: Sheet, first: int, stop: int) -> None:
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
            _hand_on(sheet, row, column)


def _hand_on(sheet: Sheet, i: int, j: int) -> None:
    """Add to the sums of this tile and of the next what one weight's error asks for."""
    top, edge = i // TILE * TILE, j // TILE * TILE
    if len(sheet.near_rows):
        sheet.down[j, top : top + 2 * TILE] += sheet.near_rows[i] * sheet.errors[i, j]
    sheet.along[i, edge : edge + 2 * TILE] += sheet.near[j] * sheet.residuals[i, j]
