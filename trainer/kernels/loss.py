"""Cross-entropy of soft-capped logits, forward and backward in one pass over z each.

With c = cap·tanh(z / cap), the loss of a token is logsumexp(c) − c[target], and its gradient is
dz = (softmax(c) − onehot(target)) · (1 − tanh²(z / cap)). Forward keeps a running maximum and sum (online softmax,
Milakov & Gimelshein, arXiv:1805.02867) and leaves one float32 per token; backward recomputes c from z. Arithmetic is
float32 whatever the type of z.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pgolf_post.errors import MismatchError

MAX_BLOCK = 4096  # columns of a row in registers at once
NUM_WARPS = 8


@triton.jit
def tanh(x: tl.tensor) -> tl.tensor:
    """Return tanh to a few units in the last place of float32, near 0 too: one division, one exponential.

    Below 0.7 a Padé approximant (5, 4), whose relative error there is under 1e-8; above, 1 − 2 / (exp(2|x|) + 1).
    """
    square = x * x
    near_top, near_bottom = x * (945.0 + square * (105.0 + square)), 945.0 + square * (420.0 + 15.0 * square)
    size = tl.abs(x)
    power = tl.exp(2.0 * tl.where(size > 20.0, 20.0, size))  # not tl.minimum, which would make a number of NaN
    far_top, far_bottom = tl.where(x < 0, 1.0 - power, power - 1.0), power + 1.0
    near = square < 0.49
    return tl.where(near, near_top, far_top) / tl.where(near, near_bottom, far_bottom)


@triton.jit
def nats_kernel(  # one program per token
    z_ptr: tl.tensor,  # (tokens, vocab)
    targets_ptr: tl.tensor,  # (tokens,)
    nats_ptr: tl.tensor,  # (tokens,) float32
    lse_ptr: tl.tensor,  # (tokens,) float32
    vocab: int,
    cap: float,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    highest = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    for start in range(0, vocab, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z = tl.load(z_ptr + row * vocab + columns, mask=columns < vocab, other=0.0).to(tl.float32)
        capped = tl.where(columns < vocab, cap * tanh(z / cap), float("-inf"))
        higher = tl.maximum(highest, tl.max(capped, axis=0))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(capped - higher), axis=0)
        highest = higher
    lse = highest + tl.log(total)
    target = tl.load(targets_ptr + row)
    known = (target >= 0) & (target < vocab)  # a target outside is NaN nats, never someone else's memory
    z = tl.load(z_ptr + row * vocab + target, mask=known, other=float("nan")).to(tl.float32)
    tl.store(nats_ptr + row, lse - cap * tanh(z / cap))
    tl.store(lse_ptr + row, lse)


@triton.jit
def gradient_kernel(  # one program per token
    grad_ptr: tl.tensor,  # (tokens,) float32
    z_ptr: tl.tensor,  # (tokens, vocab)
    targets_ptr: tl.tensor,  # (tokens,)
    lse_ptr: tl.tensor,  # (tokens,) float32
    dz_ptr: tl.tensor,  # (tokens, vocab)
    vocab: int,
    cap: float,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    grad, lse, target = tl.load(grad_ptr + row), tl.load(lse_ptr + row), tl.load(targets_ptr + row)
    for start in range(0, vocab, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z = tl.load(z_ptr + row * vocab + columns, mask=columns < vocab, other=0.0).to(tl.float32)
        t = tanh(z / cap)
        softmax = tl.exp(cap * t - lse)
        dz = grad * (softmax - tl.where(columns == target, 1.0, 0.0)) * (1.0 - t * t)
        tl.store(dz_ptr + row * vocab + columns, dz.to(dz_ptr.dtype.element_ty), mask=columns < vocab)


def block_size(vocab: int) -> int:
    return min(triton.next_power_of_2(vocab), MAX_BLOCK)


@torch.library.custom_op("pgolf::softcapped_nats", mutates_args=())
def nats_op(z: Tensor, targets: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """Return nats and logsumexp of the capped logits, each (tokens,) float32."""
    nats, lse = z.new_empty(len(z), dtype=torch.float32), z.new_empty(len(z), dtype=torch.float32)
    vocab = z.size(1)
    nats_kernel[(len(z),)](z, targets, nats, lse, vocab, cap, BLOCK=block_size(vocab), num_warps=NUM_WARPS)
    return nats, lse


@nats_op.register_fake
def _(z: Tensor, targets: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    return z.new_empty(z.size(0), dtype=torch.float32), z.new_empty(z.size(0), dtype=torch.float32)


@torch.library.custom_op("pgolf::softcapped_nats_backward", mutates_args=())
def gradient_op(grad: Tensor, z: Tensor, targets: Tensor, lse: Tensor, cap: float) -> Tensor:
    """Return dz, of z's shape and type."""
    dz, vocab = torch.empty_like(z), z.size(1)
    gradient_kernel[(len(z),)](grad, z, targets, lse, dz, vocab, cap, BLOCK=block_size(vocab), num_warps=NUM_WARPS)
    return dz


@gradient_op.register_fake
def _(grad: Tensor, z: Tensor, targets: Tensor, lse: Tensor, cap: float) -> Tensor:
    return torch.empty_like(z)


class SoftcappedNats(torch.autograd.Function):
    """Cross-entropy whose backward keeps z itself and one float32 per token.

    dz is a new tensor: overwriting z would forbid a second backward.
    """

    @staticmethod
    def forward(ctx, z, targets, cap):  # type: ignore[no-untyped-def]
        nats, lse = nats_op(z, targets, cap)
        ctx.save_for_backward(z, targets, lse)
        ctx.cap = cap
        return nats

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        z, targets, lse = ctx.saved_tensors
        return gradient_op(grad.contiguous(), z, targets, lse, ctx.cap), None, None


def softcapped_nats(
    z: Tensor,  # (tokens, vocab) float32, bfloat16 or float16: logits before the cap
    targets: Tensor,  # (tokens,) int64; one outside 0..vocab-1 makes its nats NaN
    cap: float,
) -> Tensor:  # (tokens,) float32
    """Return the nats of every token, differentiable in z. Raises MismatchError for shapes or types that do not fit."""
    if z.dim() != 2 or targets.shape != z.shape[:1]:
        raise MismatchError(f"z {tuple(z.shape)} must be (tokens, vocab) and targets {tuple(targets.shape)} (tokens,)")
    if z.dtype not in (torch.float32, torch.bfloat16, torch.float16) or targets.dtype != torch.int64:
        raise MismatchError(f"z is {z.dtype}, must be float32, bfloat16 or float16; targets {targets.dtype}, int64")
    return SoftcappedNats.apply(z.contiguous(), targets.contiguous(), cap)
