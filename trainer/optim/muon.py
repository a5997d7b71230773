"""Muon: a matrix's step is the nearest orthogonal matrix to its momentum. Shared out over ranks, transfers overlapped.

Muon (Jordan et al. 2024) orthogonalises Nesterov momentum by Newton-Schulz iterations, five by default. Coefficients:
Jordan's classic quintic, or Polar Express (Amsel et al. 2025) as the record scripts use it.

Matrices of equal shape form a bank, one stack padded with zeros until ranks can share it equally. A rank holds the
momentum of its share alone and orthogonalises that share alone. Right after backward all banks' gradients set out at
once (reduce-scatter), the largest first, and AdamW's sums behind them; a bank's updates set out for all ranks
(all-gather) as soon as they are known, while the next bank iterates, and are waited for only when weights change.
Clipping the sum needs the norm of everything before the first momentum changes, so with it the first wait is for all
gradients; without it, or where each rank clips its own beforehand, a bank starts when its own are there. Nothing is
hooked into backward itself: a bank spans all layers, so it is complete only when backward nearly is (eager, float32,
the record's 11 layers at width 256 on one CPU core: after 93.7 to 99.8 % of backward's time), and a compiled backward
hands over all gradients at its end anyway. Method of the arrangement: "parallel Muon" of the public record scripts
(openai/parameter-golf). On one rank nothing is padded, copied or sent.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from trainer.step.distributed import TrainingRanks, Transfer

Coefficients = tuple[tuple[float, float, float], ...]  # of x, x³ and x⁵ in each iteration
NewtonSchulz = Literal["classic", "polar_express"]
NewtonSchulzDtype = Literal["auto", "fp32", "bf16"]


def narrow_iterations(x: Tensor, coefficients: Coefficients) -> Tensor:
    """Run the iterations as three batched products each, their sums in the same kernels."""
    for a, b, c in coefficients:
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class Scheme(NamedTuple):
    """A way to orthogonalise updates."""

    coefficients: NewtonSchulz
    dtype: torch.dtype | None = None  # of the iterations; None = that of the momenta
    steps: int = 5
    narrow: Callable[[Tensor, Coefficients], Tensor] = narrow_iterations  # the iterations in another dtype


def narrow_dtype(choice: NewtonSchulzDtype, on_gpu: bool) -> torch.dtype | None:
    """Return bfloat16 where it is asked for, or on a GPU for "auto": its products are what Newton-Schulz is made of."""
    return torch.bfloat16 if choice == "bf16" or (choice == "auto" and on_gpu) else None


COEFFICIENTS: dict[NewtonSchulz, Coefficients] = {
    "classic": ((3.4445, -4.7750, 2.0315),) * 5,
    "polar_express": (
        (8.156555, -22.483293, 15.878769),
        (4.042930, -2.808917, 0.500018),
        (3.891668, -2.772484, 0.506065),
        (3.285754, -2.368129, 0.464490),
        (2.346541, -1.709783, 0.423236),
    ),
}


def orthogonalize(
    updates: Tensor,  # (n, rows, cols)
    coefficients: NewtonSchulz,
    dtype: torch.dtype | None = None,  # of the iterations and of the result
    steps: int = 5,
    narrow: Callable[[Tensor, Coefficients], Tensor] = narrow_iterations,
) -> Tensor:  # (n, rows, cols), singular values near 1
    """Run Newton-Schulz iterations on each matrix, in its smaller dimension.

    The classic quintic repeats; Polar Express has a polynomial of its own for each of its five, fewer are its first.

    In bfloat16 the result is 1.0 to 1.7 % from that in float32 (Frobenius norm), its singular values within 0.015: the
    iteration pulls rounding errors back as it does all others.
    """
    transposed = updates.size(-2) > updates.size(-1)
    x = updates.mT if transposed else updates
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.01 + 1e-7)
    polynomials = (COEFFICIENTS[coefficients] * steps)[:steps]
    if dtype is not None and x.dtype == torch.float32:
        x = narrow(x.to(dtype), polynomials)
        return x.mT if transposed else x
    for a, b, c in polynomials:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if transposed else x


def muon_updates(
    gradients: Tensor,  # (n, rows, cols)
    momenta: Tensor,  # (n, rows, cols)
    momentum: float | Tensor,  # (), if a tensor
    scheme: Scheme,
    row_normalize: bool,
) -> Tensor:  # (n, rows, cols)
    """Return Muon's updates: Nesterov momentum, row normalisation, orthogonalisation, × √max(1, rows/cols).

    Momenta change in place.
    """
    momenta.mul_(momentum).add_(gradients)
    update = gradients + momentum * momenta
    if row_normalize:
        update = update / (update.norm(dim=-1, keepdim=True) + 1e-7)
    rows, cols = update.shape[-2:]
    return orthogonalize(update, *scheme) * max(1.0, rows / cols) ** 0.5


UpdateFunction = Callable[[Tensor, Tensor, float | Tensor, Scheme, bool], Tensor]  # what `muon_updates` is


class Bank:
    """The matrices of one shape. Slot i of the stack is matrix i; rank r owns slots r · share to (r + 1) · share."""

    def __init__(self, matrices: Mapping[str, Tensor], ranks: TrainingRanks) -> None:
        self.names, self.matrices, self.ranks = list(matrices), list(matrices.values()), ranks
        self.share = -(-len(matrices) // ranks.world_size)
        self.momenta = self.matrices[0].new_zeros(self.share, *self.matrices[0].shape)  # of this rank's slots

    @property
    def num_slots(self) -> int:
        """Number of slots of the whole stack, padding included."""
        return self.share * self.ranks.world_size

    def used(self) -> list[int]:
        """Return the slots of matrices that this step's graph used, the same on every rank; others take no step."""
        return [slot for slot, matrix in enumerate(self.matrices) if matrix.grad is not None]

    def send_gradients(self) -> Transfer:  # (share, rows, cols)
        """Begin to sum gradients over ranks; each receives its own slots."""
        gradients = [matrix.grad for matrix in self.matrices] + [None] * (self.num_slots - len(self.matrices))
        if any(gradient is None for gradient in gradients):
            zeros = torch.zeros_like(self.matrices[0])
            gradients = [zeros if gradient is None else gradient for gradient in gradients]
        return self.ranks.reduce_scatter(torch.stack(gradients))  # type: ignore[arg-type]

    def send_updates(
        self,
        gradients: Tensor,  # (share, rows, cols), this rank's slots, summed
        momentum: float | Tensor,
        scheme: Scheme,
        row_normalize: bool,
        whole: UpdateFunction = muon_updates,  # of a share whose slots are all in use
    ) -> Transfer:  # (num_slots, rows, cols)
        """Step the momenta of this rank's slots, and begin to share their updates with all ranks."""
        first = self.ranks.rank * self.share
        mine = [slot - first for slot in self.used() if first <= slot < first + self.share]
        if len(mine) == self.share:
            return self.ranks.all_gather(whole(gradients, self.momenta, momentum, scheme, row_normalize))
        narrow = gradients.dtype == torch.float32 and scheme.dtype is not None
        updates = torch.zeros_like(gradients, dtype=scheme.dtype if narrow else None)
        momenta = self.momenta[mine]
        if mine:
            updates[mine] = muon_updates(gradients[mine], momenta, momentum, scheme, row_normalize)
            self.momenta[mine] = momenta
        return self.ranks.all_gather(updates)

    def apply(
        self,
        updates: Tensor,  # (num_slots, rows, cols)
        lr: float,
        weight_decay: float,
    ) -> None:
        """Decay the matrices that were used and step them along their updates."""
        used = self.used()
        matrices = [self.matrices[slot] for slot in used]
        torch._foreach_mul_(matrices, 1 - lr * weight_decay)
        updates = updates.to(self.momenta.dtype)
        torch._foreach_add_(matrices, [updates[slot] for slot in used], alpha=-lr)

    def state(self) -> dict[str, Tensor]:
        """Return matrix name → momentum, from all ranks' slots: every rank must call it."""
        return dict(zip(self.names, self.ranks.all_gather(self.momenta).wait(), strict=False))

    def load_state(self, momenta: Mapping[str, Tensor]) -> None:
        """Take this rank's slots of what `state` returned, whatever the number of ranks was."""
        first = self.ranks.rank * self.share
        for slot, name in enumerate(self.names[first : first + self.share]):
            self.momenta[slot].copy_(momenta[name])


def make_banks(matrices: Mapping[str, Tensor], ranks: TrainingRanks) -> list[Bank]:
    """Group matrices by shape into banks, those with most to send first."""
    shapes: dict[torch.Size, dict[str, Tensor]] = defaultdict(dict)
    for name, matrix in matrices.items():
        shapes[matrix.shape][name] = matrix
    by_size = sorted(shapes, key=lambda shape: -shape.numel() * len(shapes[shape]))
    return [Bank(shapes[shape], ranks) for shape in by_size]
