"""The weights of every matrix in numbers: its spectrum, its tails, its rows."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from pgolf_post.base.progress import progress_bar
from pgolf_post.checkpoint import View
from pgolf_post.diagnose.numbers import Number, number
from pgolf_post.diagnose.spectrum import condition, effective_rank, singular_values

SIGMAS = (3, 6)


def matrix_names(view: View) -> list[str]:
    """Return the names of a view's matrices: 2-D tensors with a role other than control."""
    tensors = view.tensors.items()
    return [name for name, tensor in tensors if tensor.ndim == 2 and view.family.role(name) != "control"]


def weight_numbers(view: View) -> list[Number]:
    """Return the numbers of every matrix. Raises NumericsError if singular values do not converge."""
    numbers: list[Number] = []
    names = matrix_names(view)
    with progress_bar("singular values", len(names), "matrices") as advance:
        for name in names:
            values = {**dict(spectral_values(name, view.tensors[name])), **dict(tail_values(view.tensors[name]))}
            places = {"role": view.family.role(name), "layer": view.family.layer(name)}
            row, ratio = worst_row(view.tensors[name])
            numbers += [number(metric, name, value, **places) for metric, value in values.items()]
            numbers.append(number("worst_row_ratio", name, ratio, at=row, **places))
            advance(note=name)
    return numbers


def spectral_values(name: str, matrix: Tensor) -> Iterator[tuple[str, float | None]]:
    """Yield the metrics that the singular values give."""
    values, least = singular_values(name, matrix)
    squares = values.square()
    for metric, rank in (
        ("effective_rank", effective_rank(values)),
        ("effective_rank_squared", effective_rank(squares)),
    ):
        yield metric, rank
        yield f"{metric}_share", rank / len(values)
    yield "stable_rank", float(squares.sum() / squares[0]) if squares[0] > 0 else 0.0
    yield "condition", condition(values, least)


def tail_values(matrix: Tensor) -> Iterator[tuple[str, float]]:
    """Yield excess kurtosis and the shares of weights beyond 3 and 6 standard deviations."""
    centred = matrix.double()
    centred = centred - centred.mean()
    variance = float(centred.square().mean())
    if variance == 0:
        yield from (("kurtosis", 0.0), *((f"beyond_{sigmas}_sigma", 0.0) for sigmas in SIGMAS))
        return
    yield "kurtosis", float(centred.square().square().mean()) / variance**2 - 3.0
    for sigmas in SIGMAS:
        yield f"beyond_{sigmas}_sigma", float((centred.square() > sigmas**2 * variance).double().mean())


def worst_row(matrix: Tensor) -> tuple[int, float | None]:
    """Return the row with the largest norm, and that norm by the median one; None where the median is 0."""
    norms = matrix.double().norm(dim=1)
    row, median = int(norms.argmax()), float(norms.median())
    return row, float(norms[row]) / median if median > 0 else (None if float(norms[row]) else 1.0)
