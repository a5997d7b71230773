"""Rounding one column after the other within a block: compiled, in torch, or with rows coupled. The rules are the same.

Each rounds columns start .. stop-1 of a panel's buffers, corrected already for all columns before start, and leaves
their errors there.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from pgolf_post.quantize.gptq import coupled
from pgolf_post.quantize.gptq.job import Job
from pgolf_post.quantize.gptq.panels import Buffers, Panel
from pgolf_post.quantize.gptq.viterbi import coset_bounds, predecessors, search

Rounding = Callable[[int, int], None]  # round columns start .. stop-1


def rounding(job: Job, panel: Panel, buffers: Buffers, feedback: Tensor, fast: bool) -> Rounding:
    """The rule for a panel of a job."""
    if job.row_feedback is not None:
        return (_compiled_coupled if fast else _numpy_coupled)(job, buffers, feedback, job.row_feedback)
    return (_compiled if fast else _in_torch)(job, panel, buffers, feedback)


def _arrays(buffers: Buffers) -> tuple[np.ndarray, ...]:  # weights, steps, shrink, errors, symbols
    """Of a panel of one chunk."""
    tensors = (buffers.weights, buffers.steps, buffers.shrink, buffers.errors, buffers.symbols)
    return tuple(tensor[:, 0].numpy() for tensor in tensors)


def _compiled_coupled(job: Job, buffers: Buffers, feedback: Tensor, row_feedback: Tensor) -> Rounding:
    from pgolf_post.quantize.gptq import coupled_kernels

    weights, steps, _, errors, symbols = _arrays(buffers)
    down = coupled.RowFeedback.of(row_feedback.numpy())
    arrays = (weights, steps, errors, symbols, feedback.numpy(), down.numbers, down.scales)
    if job.trellis is None:
        return lambda start, stop: coupled_kernels.round_coupled_scalar(*arrays, np.float32(job.limit), start, stop)
    states = job.trellis.states
    path = (predecessors(states), coset_bounds(job.limit), job.trellis.lane_rows, coupled.depth_of(states))
    return lambda start, stop: coupled_kernels.round_coupled_trellis(*arrays, *path, start, stop)


def _numpy_coupled(job: Job, buffers: Buffers, feedback: Tensor, row_feedback: Tensor) -> Rounding:
    weights, steps, _, errors, symbols = _arrays(buffers)
    along, rows = feedback.numpy(), len(job.weight)
    down = coupled.RowFeedback.of(row_feedback.numpy())

    def run(start: int, stop: int) -> None:
        for j in range(start, stop):
            step = steps[j if len(steps) > 1 else 0, :rows]
            column = (weights[j, :rows], errors[j, :rows], step, down)
            if job.trellis is None:
                found = coupled.round_scalar(*column, np.float32(job.limit))
            else:
                grid = coupled.Grid.of_trellis(job.trellis.states, job.trellis.lane_rows, job.limit)
                found = coupled.round_trellis(*column, grid)
            symbols[j, :rows], errors[j, :rows] = found
            errors[j + 1 : stop] += along[j, j + 1 : stop, None] * errors[j]

    return run


def _compiled(job: Job, panel: Panel, buffers: Buffers, feedback: Tensor) -> Rounding:
    """The kernels' rule; a compiled panel is one chunk."""
    from pgolf_post.quantize.gptq import kernels

    arrays, largest = (*_arrays(buffers), feedback.numpy()), job.limit
    if job.trellis is None:
        return lambda start, stop: kernels.round_scalar(*arrays, np.float32(largest), start, stop)
    path = (predecessors(job.trellis.states), coset_bounds(largest), panel.lane_rows, panel.lanes)
    return lambda start, stop: kernels.round_trellis(*arrays, *path, start, stop)


def _in_torch(job: Job, panel: Panel, buffers: Buffers, feedback: Tensor) -> Rounding:
    """The same in torch, operation by operation."""
    steps, shrink, errors = buffers.steps, buffers.shrink, buffers.errors
    largest = job.limit
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
            step, factor = steps[j if len(steps) > 1 else 0], shrink[j if len(shrink) > 1 else 0]
            points, symbols = nearest((buffers.weights[j] + errors[j]) / step * factor)
            buffers.symbols[j] = symbols.to(torch.int16)
            errors[j] = buffers.weights[j] - points * step
            errors[j + 1 : stop] += feedback[j, j + 1 : stop, None, None] * errors[j]

    return run
