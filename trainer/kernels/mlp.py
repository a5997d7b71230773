"""The MLP y = act(x upᵀ) downᵀ with act = leaky-relu² (slope 0: relu²), its activation inside the matmuls beside it.

Forward squares in the epilogue of x·upᵀ and stores h = act(pre) alone. Backward needs act'(pre), and h gives it back:
|act'(pre)| is 2√h above zero and 2·slope·√h below, so all that must be kept beside h (which the gradient of `down`
needs anyway) is the sign of pre, a byte per element, and not even that for relu². It is applied in the epilogue of
dy·down. The other three products of backward are plain matmuls, left to PyTorch's library. The tiling with its grouped
order of tiles is the one of Triton's matmul tutorial; sums are float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from pgolf_post.errors import MismatchError

GROUP = 8  # rows of tiles that are visited together, so that their operands stay in the L2 cache


def config(block_m: int, block_n: int, warps: int, stages: int) -> triton.Config:
    """Return a tiling to choose from. All have the same BLOCK_K: the choice does not change the order of summation."""
    return triton.Config({"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": 64}, num_warps=warps, num_stages=stages)


CONFIGS = [config(128, 128, 8, 4), config(64, 256, 8, 4), config(64, 128, 4, 4)]
UP_CONFIGS = [config(128, 256, 8, 3), *CONFIGS]  # in the backward kernel the largest tile spills registers
if triton.knobs.runtime.interpret:  # the interpreter has nothing to time
    CONFIGS = UP_CONFIGS = [config(32, 64, 4, 1)]


@triton.jit
def tile_origin(m: int, n: int, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr) -> tuple[int, int]:
    """Return the first row and column of this program's tile, in groups of GROUP rows of tiles."""
    tiles_m, tiles_n = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    program = tl.program_id(0)
    first = program // (GROUP * tiles_n) * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    within = program % (GROUP * tiles_n)
    return (first + within % height) * BLOCK_M, within // height * BLOCK_N


@triton.jit
def tile_product(
    a_ptr: tl.tensor,  # (m, k) row-major
    b_ptr: tl.tensor,  # (k, n) with the strides below
    row: int,
    column: int,
    m: int,
    n: int,
    k: int,
    stride_bk: int,
    stride_bn: int,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """Return the (BLOCK_M, BLOCK_N) float32 tile of a @ b at (row, column); beyond the end, both wrap around."""
    rows = ((row + tl.arange(0, BLOCK_M)) % m).to(tl.int64)
    columns = ((column + tl.arange(0, BLOCK_N)) % n).to(tl.int64)
    inner = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + rows[:, None] * k + inner[None, :]
    b_ptrs = b_ptr + inner[:, None] * stride_bk + columns[None, :] * stride_bn
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, k, BLOCK_K):
        if EVEN_K:
            a, b = tl.load(a_ptrs), tl.load(b_ptrs)
        else:
            a = tl.load(a_ptrs, mask=inner[None, :] < k - start, other=0.0)
            b = tl.load(b_ptrs, mask=inner[:, None] < k - start, other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
        a_ptrs += BLOCK_K
        b_ptrs += BLOCK_K * stride_bk
    return total


@triton.autotune(UP_CONFIGS, key=["m", "n", "k"])
@triton.jit
def up_kernel(  # one program per tile of h
    x_ptr: tl.tensor,  # (m, k)
    up_ptr: tl.tensor,  # (n, k)
    h_ptr: tl.tensor,  # (m, n)
    negative_ptr: tl.tensor,  # (m, n) uint8 if SIGNED
    slope: float,
    m: int,
    n: int,
    k: int,
    SIGNED: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    row, column = tile_origin(m, n, BLOCK_M, BLOCK_N, GROUP)
    pre = tile_product(x_ptr, up_ptr, row, column, m, n, k, 1, k, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION)
    leaky = tl.where(pre < 0, pre * slope, pre)
    rows, columns = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
    offsets = rows[:, None].to(tl.int64) * n + columns[None, :]
    inside = (rows[:, None] < m) & (columns[None, :] < n)
    tl.store(h_ptr + offsets, (leaky * leaky).to(h_ptr.dtype.element_ty), mask=inside)
    if SIGNED:
        tl.store(negative_ptr + offsets, (pre < 0).to(tl.uint8), mask=inside)


@triton.autotune(CONFIGS, key=["m", "n", "k"])
@triton.jit
def down_backward_kernel(  # one program per tile of dpre
    dy_ptr: tl.tensor,  # (m, k)
    down_ptr: tl.tensor,  # (k, n)
    h_ptr: tl.tensor,  # (m, n)
    negative_ptr: tl.tensor,  # (m, n) uint8 if SIGNED
    dpre_ptr: tl.tensor,  # (m, n)
    slope: float,
    m: int,
    n: int,
    k: int,
    SIGNED: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    row, column = tile_origin(m, n, BLOCK_M, BLOCK_N, GROUP)
    dh = tile_product(dy_ptr, down_ptr, row, column, m, n, k, n, 1, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION)
    rows, columns = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
    offsets = rows[:, None].to(tl.int64) * n + columns[None, :]
    inside = (rows[:, None] < m) & (columns[None, :] < n)
    slant = 2.0 * tl.sqrt(tl.load(h_ptr + offsets, mask=inside, other=0.0).to(tl.float32))
    if SIGNED:
        negative = tl.load(negative_ptr + offsets, mask=inside, other=0)
        slant = tl.where(negative != 0, -slope * slant, slant)
    tl.store(dpre_ptr + offsets, (dh * slant).to(dpre_ptr.dtype.element_ty), mask=inside)


def constants(a: Tensor, m: int, n: int, k: int, slope: float) -> dict[str, object]:
    """Return what both kernels are compiled for: sizes, and the precision of products.

    Products of bfloat16 are exact in float32; those of float32 stay float32.
    """
    return {
        "m": m,
        "n": n,
        "k": k,
        "SIGNED": slope > 0,
        "EVEN_K": k % 64 == 0,
        "PRECISION": "ieee" if a.dtype == torch.float32 else "tf32",
        "GROUP": GROUP,
    }


def tiles(m: int, n: int):  # type: ignore[no-untyped-def]
    """Return the launch grid, as a function of the chosen tiling."""
    return lambda meta: (triton.cdiv(m, meta["BLOCK_M"]) * triton.cdiv(n, meta["BLOCK_N"]),)


def empty_outputs(x: Tensor, up: Tensor, slope: float) -> tuple[Tensor, Tensor]:
    """Return the tensors that `up_kernel` will write h and the signs to."""
    shape = (x.size(0), up.size(0))
    return x.new_empty(shape), x.new_empty(shape if slope > 0 else (0, 0), dtype=torch.uint8)


@torch.library.custom_op("pgolf::mlp_up", mutates_args=())
def up_op(x: Tensor, up: Tensor, slope: float) -> tuple[Tensor, Tensor]:
    """Return h = act(x upᵀ) and, as uint8, where x upᵀ is negative; the latter is empty for slope 0."""
    m, (n, k) = len(x), up.shape
    h, negative = empty_outputs(x, up, slope)
    up_kernel[tiles(m, n)](x, up, h, negative, slope, **constants(x, m, n, k, slope))
    return h, negative


up_op.register_fake(empty_outputs)


@torch.library.custom_op("pgolf::mlp_down_backward", mutates_args=())
def down_backward_op(dy: Tensor, down: Tensor, h: Tensor, negative: Tensor, slope: float) -> Tensor:
    """Return d loss / d (x upᵀ), of h's shape and type."""
    m, (k, n) = len(dy), down.shape
    dpre = torch.empty_like(h)
    down_backward_kernel[tiles(m, n)](dy, down, h, negative, dpre, slope, **constants(dy, m, n, k, slope))
    return dpre


@down_backward_op.register_fake
def _(dy: Tensor, down: Tensor, h: Tensor, negative: Tensor, slope: float) -> Tensor:
    return torch.empty_like(h)


class FusedMLP(torch.autograd.Function):
    """The fused MLP; for backward it keeps x, both weights, h and the signs."""

    @staticmethod
    def forward(ctx, x, up, down, slope):  # type: ignore[no-untyped-def]
        h, negative = up_op(x, up, slope)
        ctx.save_for_backward(x, up, down, h, negative)
        ctx.slope = slope
        return F.linear(h, down)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        x, up, down, h, negative = ctx.saved_tensors
        dy = dy.contiguous()
        dpre = down_backward_op(dy, down, h, negative, ctx.slope)
        return dpre @ up, dpre.mT @ x, dy.mT @ h, None


def fused_mlp(
    x: Tensor,  # (…, model_dim)
    up: Tensor,  # (hidden_dim, model_dim)
    down: Tensor,  # (model_dim, hidden_dim)
    slope: float,  # of the leaky relu below zero; 0 = relu
) -> Tensor:  # (…, model_dim), of x's type, or autocast's
    """Return act(x upᵀ) downᵀ. Raises MismatchError for shapes that do not fit, or float64."""
    if up.shape != (down.size(1), x.size(-1)) or slope < 0:
        shapes = f"x {tuple(x.shape)}, up {tuple(up.shape)}, down {tuple(down.shape)}, slope {slope}"
        raise MismatchError(f"{shapes}: must be (…, dim), (hidden, dim), (dim, hidden), slope ≥ 0")
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    if dtype == torch.float64:
        raise MismatchError("the fused MLP sums in float32; x is float64")
    rows = x.to(dtype).reshape(-1, x.size(-1)).contiguous()
    y: Tensor = FusedMLP.apply(rows, up.to(dtype).contiguous(), down.to(dtype).contiguous(), slope)
    return y.reshape(*x.shape[:-1], down.size(0))
