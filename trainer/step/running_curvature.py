"""Running Fisher information of every matrix, from the gradients that the optimizer gets anyway.

`fit` rounds by two second moments of each matrix: C, of the gradients δ at its outputs, and M, of its inputs x, tokens
weighted by δ². The gradient of a step's mean loss over T tokens is G = Σ δ_t x_tᵀ / T. Where tokens' gradients are
independent with mean nearly 0,

    T·E[G Gᵀ] = tr(M)·C      T·E[Gᵀ G] = tr(C)·M      T·E|G|² = tr(C)·tr(M), the trace of the Fisher information

so running means of G Gᵀ and Gᵀ G give both without a hook, a second backward or another graph (the sums that Shampoo
keeps: Gupta et al. 2018, arXiv:1802.09568). Labels are the text's own here, not drawn from the model, and what mean G
has is counted in. Of a table, an embedding or a head, C has its diagonal alone, as in `fit`.

Under several ranks the gradients of a refresh are summed over them first, so that the moments are those of one process.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

DECAY = 0.95  # of the running means, a refresh; the first are plain means
RIDGE = 0.01  # added to both diagonals, as a share of their means
LEAST = 1e-12  # of it


@dataclass
class Moments:
    """Means over refreshes for one matrix (out, in), times the tokens of a step."""

    rows: Tensor  # G Gᵀ (out, out), or its diagonal (out,)
    columns: Tensor  # Gᵀ G (in, in)
    count: int = 0  # refreshes


@dataclass(frozen=True)
class Whitening:
    """Upper triangular factors C = U·Uᵀ and M = V·Vᵀ, and what a row and a column cost."""

    rows: Tensor  # U (out, out), or its diagonal (out,)
    columns: Tensor  # V (in, in)
    row_pivots: Tensor  # (out,) D: what a row costs once later rows have adapted
    column_pivot: Tensor  # () geometric mean of what a column costs once later columns have adapted

    def unwhiten(self, normal: Tensor) -> Tensor:  # Z (out, in) → (out, in)
        """Return U⁻ᵀ·Z·V⁻¹, whose every direction costs the same if Z is normal."""
        shaped = torch.linalg.solve_triangular(self.columns, normal, upper=True, left=False)
        if self.rows.ndim == 1:
            return shaped / self.rows[:, None]
        return torch.linalg.solve_triangular(self.rows.mT, shaped, upper=False)


class RunningCurvature:
    """The moments of a model's matrices."""

    def __init__(
        self,
        matrices: Mapping[str, Tensor],  # (out, in) each
        tables: frozenset[str],  # those whose C is a diagonal
    ) -> None:
        self.moments = {
            name: Moments(
                weight.new_zeros(len(weight) if name in tables else (len(weight), len(weight))),
                weight.new_zeros(weight.shape[1], weight.shape[1]),
            )
            for name, weight in matrices.items()
        }

    @torch.no_grad()
    def update(
        self,
        gradients: Mapping[str, Tensor],  # of the mean loss of a step, summed over ranks
        tokens: int,  # of the step
    ) -> None:
        """Take up the gradients of one step."""
        for name, gradient in gradients.items():
            known = self.moments[name]
            known.count += 1
            share = max(1 / known.count, 1 - DECAY)
            rows = gradient.square().sum(1) if known.rows.ndim == 1 else gradient @ gradient.mT
            known.rows.lerp_(tokens * rows, share)
            known.columns.lerp_(tokens * (gradient.mT @ gradient), share)

    def known(self, refreshes: int) -> list[str]:
        """Return the matrices that at least so many refreshes had gradients of."""
        return [name for name, moments in self.moments.items() if moments.count >= refreshes]

    @torch.no_grad()
    def whitening(self, name: str) -> Whitening:
        """Return the factors of one matrix; not numbers where its moments are not, so that the next loss shows it."""
        known = self.moments[name]
        trace = known.columns.trace().clamp(min=LEAST)  # a matrix without a gradient has room for any noise
        columns = _upper_root(_with_ridge(known.columns / trace))
        if known.rows.ndim == 1:
            pivots = known.rows + (RIDGE * known.rows.mean()).clamp(min=LEAST)
            rows = pivots.sqrt()
        else:
            rows = _upper_root(_with_ridge(known.rows))
            pivots = rows.diagonal().square()
        return Whitening(rows, columns, pivots, columns.diagonal().log().mean().mul(2).exp())

    def state(self) -> dict[str, Tensor]:
        """Return all moments as named tensors of training.safetensors."""
        found: dict[str, Tensor] = {}
        for name, known in self.moments.items():
            parts = (known.rows, known.columns, torch.tensor(known.count))
            found |= {f"curvature.{part}.{name}": value for part, value in zip(PARTS, parts, strict=True)}
        return found

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take what `state` returned."""
        for name, known in self.moments.items():
            rows, columns, count = (state[f"curvature.{part}.{name}"] for part in PARTS)
            known.rows.copy_(rows)
            known.columns.copy_(columns)
            known.count = int(count)


PARTS = ("rows", "columns", "count")


def num_numbers(out_rows: int, in_columns: int, table: bool) -> int:
    """Return how many numbers are held for one matrix: its moments and as many of their factors."""
    return 2 * ((out_rows if table else out_rows**2) + in_columns**2)


def _with_ridge(moment: Tensor) -> Tensor:  # (n, n) → the same
    ridge = (RIDGE * moment.diagonal().mean()).clamp(min=LEAST)
    return moment + ridge * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)


def _upper_root(moment: Tensor) -> Tensor:  # (n, n) → (n, n)
    """Return the upper triangular U of moment = U·Uᵀ; not numbers where the moment is not positive definite.

    From the last to the first, as `fit` orders them: U's diagonal squared is what i costs once all after it have
    adapted.
    """
    lower, info = torch.linalg.cholesky_ex(moment.flip(0, 1))
    return torch.where(info == 0, lower, torch.nan).flip(0, 1)
