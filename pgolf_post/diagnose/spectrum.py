"""Singular values of a matrix, and what they say of how much of its width it uses.

The effective rank is the exponential of the entropy of the normalised singular values (Roy and Vetterli 2007): the
number of equal singular values that would have this entropy. It is the width for an orthogonal matrix and 1 for an
outer product. The same of the squared values weighs directions by their energy. The stable rank is ‖W‖²_F / σ₁².

A matrix at least twice as long as wide goes through the eigenvalues of its Gram matrix in float64, which is a fraction
of the time: relative to σ₁, singular values are then good to √ε of float64, 1.5e-8. Others go through an SVD in
float32, good to 1e-7.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pgolf_post.errors import NumericsError

THIN = 2  # long side by short side from which the Gram matrix is used
LEAST = {"gram": 1e-7, "svd": 1e-6}  # of σ₁: smaller singular values are rounding errors


def singular_values(name: str, matrix: Tensor) -> tuple[Tensor, float]:  # (min(out, in),) float64 descending; least
    """Return a matrix's singular values, and below which of them they are rounding errors.

    Raises NumericsError naming the tensor if the decomposition does not converge.
    """
    tall = matrix.float() if matrix.size(0) >= matrix.size(1) else matrix.float().T
    try:
        if tall.size(0) >= THIN * tall.size(1):
            wide = tall.double()
            values, how = torch.linalg.eigvalsh(wide.T @ wide).clamp(min=0).sqrt().flip(0), "gram"
        else:
            values, how = torch.linalg.svdvals(tall).double(), "svd"
    except torch.linalg.LinAlgError as error:
        raise NumericsError(
            f"{name} {tuple(matrix.shape)}: its singular values do not converge ({error})",
            hint="pgolf-post checkpoint verify   (is every weight finite and of a sane size?)",
        ) from error
    return values, LEAST[how] * float(values[0])


def effective_rank(values: Tensor) -> float:  # (n,) not negative
    """Return exp of the entropy of the values divided by their sum; 0 if they are all 0."""
    total = float(values.sum())
    if total <= 0:
        return 0.0
    shares = values / total
    return math.exp(float(torch.special.entr(shares).sum()))


def condition(values: Tensor, least: float) -> float | None:  # (n,) descending
    """Return the largest singular value by the smallest; None if the smallest cannot be told from 0."""
    smallest = float(values[-1])
    return float(values[0]) / smallest if smallest > least else None
