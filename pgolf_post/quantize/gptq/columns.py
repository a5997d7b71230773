"""Rounding one column after the other within a block: compiled, in torch, or with rows coupled. The rules are the same.

Each rounds columns start .. stop-1 of a panel's buffers, corrected already for all columns before start, and leaves
their errors there. reference.py defines what they compute.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from pgolf_post.quantize.gptq import coupled
from pgolf_post.quantize.gptq.coupled import RowFeedback
from pgolf_post.quantize.gptq.job import Job
from pgolf_post.quantize.gptq.panels import Buffers, Columns, Panel
from pgolf_post.quantize.gptq.viterbi import Grid, coset_bounds, search

Rounding = Callable[[int, int], None]  # round columns start .. stop-1


def rounding(job: Job, panel: Panel, buffers: Buffers, feedback: Tensor, fast: bool) -> Rounding:
    """Return the function that rounds a panel of a job."""
    if job.row_feedback is not None:
        columns, row_feedback = buffers.columns(feedback), RowFeedback.of(job.row_feedback.numpy())
        return (_compiled_coupled if fast else _numpy_coupled)(job, columns, row_feedback)
    if fast:
        return _compiled(job, panel, buffers.columns(feedback))
    return _in_torch(job, panel, buffers, feedback)


def _compiled(job: Job, panel: Panel, columns: Columns) -> Rounding:
    """Rows that do not depend on each other; a compiled panel is one chunk."""
    from pgolf_post.quantize.gptq import kernels

    if job.trellis is None:
        return lambda start, stop: kernels.round_scalar(columns, np.float32(job.limit), start, stop)
    grid = Grid.of(job.trellis.states, panel.lane_rows, job.limit)
    return lambda start, stop: kernels.round_trellis(columns, grid, panel.lanes, start, stop)


def _compiled_coupled(job: Job, columns: Columns, row_feedback: RowFeedback) -> Rounding:
    from pgolf_post.quantize.gptq import coupled_kernels

    if job.trellis is None:
        largest = np.float32(job.limit)
        return lambda start, stop: coupled_kernels.round_coupled_scalar(columns, row_feedback, largest, start, stop)
    grid = Grid.of(job.trellis.states, job.trellis.lane_rows, job.limit)
    depth = coupled.depth_of(job.trellis.states)
    return lambda start, stop: coupled_kernels.round_coupled_trellis(columns, row_feedback, grid, depth, start, stop)


def _numpy_coupled(job: Job, columns: Columns, row_feedback: RowFeedback) -> Rounding:
    rows, errors = len(job.weight), columns.errors
    grid = Grid.of(job.trellis.states, job.trellis.lane_rows, job.limit) if job.trellis else None

    def run(start: int, stop: int) -> None:
        for j in range(start, stop):
            step = columns.steps[j if len(columns.steps) > 1 else 0, :rows]
            column = (columns.weights[j, :rows], errors[j, :rows], step, row_feedback)
            if grid is None:
                symbols, residuals = coupled.round_scalar(*column, np.float32(job.limit))
            else:
                symbols, residuals = coupled.round_trellis(*column, grid)
            columns.symbols[j, :rows], errors[j, :rows] = symbols, residuals
            errors[j + 1 : stop] += columns.feedback[j, j + 1 : stop, None] * errors[j]

    return run


def _in_torch(job: Job, panel: Panel, buffers: Buffers, feedback: Tensor) -> Rounding:
    """Rows that do not depend on each other, in torch: the kernels' operations in the kernels' order."""
    steps, errors, largest = buffers.steps, buffers.errors, job.limit
    bounds = torch.from_numpy(coset_bounds(largest)).to(errors.device)
    used = panel.lanes * panel.lane_rows

    def nearest(targets: Tensor) -> tuple[Tensor, Tensor]:  # (chunks, width) → grid points, symbols
        if job.trellis is None:
            symbols = torch.clamp(torch.round(targets), -largest, largest)
            return symbols, symbols
        lanes = targets[:, :used].reshape(panel.chunks, panel.lane_rows, panel.lanes).transpose(0, 1)
        paths = search(lanes.reshape(panel.lane_rows, -1), job.trellis.states, bounds)
        points, symbols = torch.zeros_like(targets), torch.zeros_like(targets)
        for path, out in zip(paths, (points, symbols), strict=True):
            out[:, :used] = path.view(lanes.shape).transpose(0, 1).reshape(panel.chunks, used)
        return points, symbols

    def run(start: int, stop: int) -> None:
        for j in range(start, stop):
            step = steps[j if len(steps) > 1 else 0]
            points, symbols = nearest((buffers.weights[j] + errors[j]) / step)
            buffers.symbols[j] = symbols.to(torch.int16)
            errors[j] = buffers.weights[j] - points * step
            errors[j + 1 : stop] += feedback[j, j + 1 : stop, None, None] * errors[j]

    return run
