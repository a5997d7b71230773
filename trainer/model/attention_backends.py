"""The kernels that compute causal attention, and which of them can run here.

Softmax attention has one definition and several implementations; which is fastest depends on the device, the dtype and
whether documents are isolated. A backend is a runtime choice, never part of the model: all give the same output to
tolerance. Each reads who may attend to whom in a form of its own (a mask, a block mask, document boundaries), which is
made once per forward pass and shared by all layers.

SDPA (PyTorch's own) runs everywhere and is the definition the others are tested against. FlexAttention (Dong et al.
2024) skips masked blocks. Variable-length attention (torch.nn.attention.varlen) and FlashAttention-3 (Shah et al. 2024)
take all documents as one ragged batch and never look across a boundary.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf_post.base.copying import to_device
from pgolf_post.errors import SettingsError

BackendName = Literal["sdpa", "flex", "varlen", "fa3"]
BackendChoice = Literal["auto", "sdpa", "flex", "varlen", "fa3"]

HALF = (torch.float16, torch.bfloat16)
VARLEN_TOLERANCE = 0.03  # bfloat16 has 8 bits: its own rounding of such values is below 0.01

Unavailable = str  # why a backend cannot run, as the end of a sentence


@dataclass(frozen=True)
class Reach:
    """Who may attend to whom in one forward pass, in the form that its backend reads."""

    backend: Backend
    within: Any  # None = the whole past, where the backend has that form; else see the backend's `reach`

    def attend(
        self,
        q: Tensor,  # (batch, heads, seq_len, head_dim)
        k: Tensor,  # (batch, kv_heads, seq_len, head_dim)
        v: Tensor,
    ) -> Tensor:  # (batch, heads, seq_len, head_dim)
        """Return softmax attention over what is in reach, scale 1/√head_dim; query head h reads kv head h // group."""
        dtype = kernel_dtype(q)
        return self.backend.attend(q.to(dtype), k.to(dtype), v.to(dtype), self.within)


@dataclass(frozen=True)
class Backend:
    """One implementation: whether it can run, the form of reach it reads, and the attention itself."""

    name: BackendName
    unavailable: Callable[[torch.device, torch.dtype, bool], Unavailable | None]  # device, dtype, training
    reach: Callable[[Tensor, Tensor | None, torch.device], Any]  # tokens, document (batch, seq_len) → Reach.within
    attend: Callable[[Tensor, Tensor, Tensor, Any], Tensor]  # q, k, v, Reach.within


def kernel_dtype(q: Tensor) -> torch.dtype:
    """Return the dtype of the attention kernel: autocast's where it is on, as in SDPA itself, else the query's."""
    device = q.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else q.dtype


# ---- SDPA ----------------------------------------------------------------------------------------------------------


def document_mask(tokens: Tensor, document: Tensor | None, device: torch.device) -> Tensor | None:
    """Return the mask (batch, 1, seq_len, seq_len): causal, within equal `document`; None = plain causal.

    It is bool, true where attention is, or on a GPU 0 there and -inf elsewhere: SDPA's kernels for CUDA add a mask, and
    would make that of a bool one on every visit, and keep each for backward.
    """
    if document is None:
        return None
    document = to_device(document, device)
    mask = torch.tril(document[:, :, None] == document[:, None, :])[:, None]
    return additive_mask(mask) if device.type == "cuda" else mask


def additive_mask(mask: Tensor) -> Tensor:
    """Return a bool mask as what is added to scores, in autocast's dtype where it is on, else float32."""
    kind = mask.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))


def sdpa_attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attend by PyTorch's scaled_dot_product_attention.

    SDPA shares keys between the queries of a group (enable_gqa), except in its CUDA kernels for masks and wide dtypes,
    where it would fall back to a matrix of all scores. There, keys and values are repeated instead.
    """
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    group = q.size(1) // k.size(1)
    if group > 1 and q.is_cuda and (mask is not None or q.dtype not in HALF):
        k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
        group = 1
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=group > 1)


# ---- FlexAttention -------------------------------------------------------------------------------------------------


def flex_unavailable(device: torch.device, dtype: torch.dtype, training: bool) -> Unavailable | None:
    """Return why FlexAttention cannot run: its backward pass has no CPU implementation (torch 2.13)."""
    if training and device.type != "cuda":
        return f"flex_attention has no backward pass on {device.type}"
    return None


def document_block_mask(tokens: Tensor, document: Tensor | None, device: torch.device) -> Any:
    """Return a BlockMask: causal, and within equal values of `document` if given."""
    from torch.nn.attention.flex_attention import create_block_mask

    def causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query >= key

    batch_size, seq_len = tokens.shape
    if document is None:
        return create_block_mask(causal, None, None, seq_len, seq_len, device=str(device))
    ids = to_device(document, device)

    def causal_within(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (ids[batch, query] == ids[batch, key])

    return create_block_mask(causal_within, batch_size, None, seq_len, seq_len, device=str(device))


@lru_cache(maxsize=1)
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    compiled: Callable[..., Tensor] = torch.compile(flex_attention)
    return compiled


def flex_attend(q: Tensor, k: Tensor, v: Tensor, blocks: Any) -> Tensor:
    """Attend by torch.nn.attention.flex_attention. Uncompiled it computes all scores, so on CUDA it is compiled.

    Inside a function that is being compiled it becomes part of that graph; elsewhere it is compiled by itself.
    """
    from torch.nn.attention.flex_attention import flex_attention

    alone = q.is_cuda and not torch.compiler.is_compiling()
    attend: Callable[..., Tensor] = _compiled_flex() if alone else flex_attention  # type: ignore[assignment]
    return attend(q, k, v, block_mask=blocks, enable_gqa=q.size(1) != k.size(1))


# ---- ragged batches: torch's varlen, FlashAttention-3 --------------------------------------------------------------


def document_boundaries(tokens: Tensor, document: Tensor | None, device: torch.device) -> Tensor:
    """Return cu_seqlens, (num_documents + 1,) int32: each document's start in the flattened batch, then its length.

    A window always starts a document, and so does every change of `document`, whose values must not come back in a
    window. Tokens on the CPU give the number of documents without waiting for a GPU.
    """
    if document is None:
        batch_size, seq_len = tokens.shape
        return torch.arange(batch_size + 1, dtype=torch.int32, device=device) * seq_len
    starts = torch.ones_like(document, dtype=torch.bool)
    starts[:, 1:] = document[:, 1:] != document[:, :-1]
    offsets = starts.flatten().nonzero().flatten().to(torch.int32)
    return to_device(torch.cat((offsets, offsets.new_tensor([document.numel()]))), device)


def _ragged(x: Tensor) -> Tensor:  # (batch, heads, seq_len, head_dim) → (batch · seq_len, heads, head_dim)
    """Lay windows end to end; flash kernels take any strides but the last dimension's, which must be 1."""
    ragged = x.transpose(1, 2).flatten(0, 1)
    return ragged if ragged.stride(-1) == 1 else ragged.contiguous()


def _half_on_cuda(device: torch.device, dtype: torch.dtype, capability: tuple[int, int]) -> Unavailable | None:
    """Return why a ragged kernel cannot run: it needs a GPU of at least this capability and a 16-bit dtype."""
    if device.type != "cuda":
        return f"it needs a CUDA device, this is {device.type}"
    own = torch.cuda.get_device_capability(device)
    if own < capability:
        return f"it needs compute capability {capability[0]}.{capability[1]}, this GPU has {own[0]}.{own[1]}"
    if dtype not in HALF:
        return f"it computes in bfloat16 or float16, this run in {str(dtype).removeprefix('torch.')}"
    return None


def varlen_unavailable(device: torch.device, dtype: torch.dtype, training: bool) -> Unavailable | None:
    """Return why torch's varlen attention cannot run: torch has it from 2.10 on, with windows from 2.11 on.

    Before it had `enable_gqa` its kernel grouped queries all the same, which is not documented: it must then give what
    SDPA gives, once in this process.
    """
    reason = _half_on_cuda(device, dtype, (8, 0))
    if reason:
        return reason
    from trainer.model import varlen

    if not varlen.PARAMETERS:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen"
    if "window_size" not in varlen.PARAMETERS:
        return f"varlen_attn of torch {torch.__version__} takes no window_size"
    return None if "enable_gqa" in varlen.PARAMETERS else varlen_disagrees(device, dtype)


@lru_cache
@torch.no_grad()
def varlen_disagrees(device: torch.device, dtype: torch.dtype) -> Unavailable | None:
    """Return why varlen attention is not to be trusted here: an error, or other values than SDPA's in float32."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 48, 64, generator=generator).to(device, dtype) for heads in (4, 2, 2))
    document = (torch.arange(48) // 20)[None]
    try:
        found = varlen_attend(q, k, v, document_boundaries(document, document, device)).float()
    except RuntimeError as error:
        return f"varlen_attn of torch {torch.__version__} fails: {str(error).splitlines()[0]}"
    k, v = (x.float().repeat_interleave(2, dim=1) for x in (k, v))
    expected = F.scaled_dot_product_attention(q.float(), k, v, attn_mask=document_mask(document, document, device))
    worst = float((found - expected).abs().max())
    if not worst < VARLEN_TOLERANCE:
        return f"varlen_attn of torch {torch.__version__} differs from SDPA by {worst:.3g} with grouped queries"
    return None


def varlen_attend(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Attend by torch.nn.attention.varlen.varlen_attn, documents as a ragged batch; window (-1, 0) is causal."""
    from torch.nn.attention.varlen import varlen_attn

    from trainer.model.varlen import PARAMETERS

    batch_size, heads, seq_len, head_dim = q.shape
    grouped: dict[str, Any] = {"enable_gqa": heads != k.size(1)} if "enable_gqa" in PARAMETERS else {}
    out = varlen_attn(
        _ragged(q), _ragged(k), _ragged(v), cu_seqlens, cu_seqlens, seq_len, seq_len, window_size=(-1, 0), **grouped
    )
    assert isinstance(out, Tensor)
    return out.view(batch_size, seq_len, heads, head_dim).transpose(1, 2)


def fa3_unavailable(device: torch.device, dtype: torch.dtype, training: bool) -> Unavailable | None:
    """Return why FlashAttention-3 cannot run: it is a package of its own, for Hopper GPUs."""
    if not fa3_installed():
        return "the package flash_attn_interface (FlashAttention-3) is not installed"
    broken = fa3_broken() if device.type == "cuda" else None  # elsewhere it need not be imported
    return broken or _half_on_cuda(device, dtype, (9, 0))


def fa3_installed() -> bool:
    """Return whether there is a package of FlashAttention-3, be it of use here or not."""
    return importlib.util.find_spec("flash_attn_interface") is not None


def fa3_broken() -> Unavailable | None:
    """Return why the installed FlashAttention-3 cannot be used: its binary may have been built for another torch."""
    try:
        importlib.import_module("flash_attn_interface")
    except Exception as error:  # whatever loading a foreign binary may raise
        problem = (str(error).splitlines() or [type(error).__name__])[0]
        return f"flash_attn_interface cannot be imported with torch {torch.__version__}: {problem}"
    return None


def packed_boundaries(tokens: Tensor, document: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor] | None:
    """Return cu_seqlens of isolated documents, of queries and of keys; None for whole windows, taken as they are.

    The two are equal and yet two tensors: torch.compile refuses an autograd function that is given one tensor twice.
    """
    if document is None:
        return None
    boundaries = document_boundaries(tokens, document, device)
    return boundaries, boundaries.clone()


def fa3_attend(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: tuple[Tensor, Tensor] | None) -> Tensor:
    """Attend by FlashAttention-3: flash_attn_func over whole windows, flash_attn_varlen_func over documents."""
    from flash_attn_interface import flash_attn_func, flash_attn_varlen_func

    batch_size, heads, seq_len, head_dim = q.shape
    if cu_seqlens is None:
        out = flash_attn_func(*(t.transpose(1, 2).contiguous() for t in (q, k, v)), causal=True)
    else:
        of_queries, of_keys = cu_seqlens
        out = flash_attn_varlen_func(
            _ragged(q), _ragged(k), _ragged(v),
            cu_seqlens_q=of_queries, cu_seqlens_k=of_keys, max_seqlen_q=seq_len, max_seqlen_k=seq_len, causal=True,
        )  # fmt: skip
    if isinstance(out, tuple):  # earlier releases give (output, log-sum-exp)
        out = out[0]
    return out.view(batch_size, seq_len, heads, head_dim).transpose(1, 2)


# ---- the choice ----------------------------------------------------------------------------------------------------

BACKENDS: dict[BackendName, Backend] = {
    "sdpa": Backend("sdpa", lambda device, dtype, training: None, document_mask, sdpa_attend),
    "flex": Backend("flex", flex_unavailable, document_block_mask, flex_attend),
    "varlen": Backend("varlen", varlen_unavailable, document_boundaries, varlen_attend),
    "fa3": Backend("fa3", fa3_unavailable, packed_boundaries, fa3_attend),
}
SDPA = BACKENDS["sdpa"]

AUTO_ISOLATED: tuple[BackendName, ...] = ("fa3", "varlen", "sdpa")  # the first that is available
AUTO_PACKED: tuple[BackendName, ...] = ("fa3", "sdpa")  # over whole rows SDPA is a flash kernel already


def warning_of(
    choice: BackendChoice, backend: Backend, device: torch.device, isolated: bool, windows: int, seq_len: int
) -> str | None:
    """Return what to tell about the backend that "auto" chose: a package left unused, or a mask and its cost."""
    if choice != "auto" or device.type != "cuda":
        return None
    said = []
    if fa3_installed() and (broken := fa3_broken()):
        said.append(f"FlashAttention-3 is installed but not used: {broken}")
    if isolated and backend.name == "sdpa":
        mask = windows * seq_len * seq_len
        said.append(
            f"attention is SDPA with a mask ({windows}, 1, {seq_len}, {seq_len}) of {mask / 2**20:,.0f} MiB, which "
            "every block visit reads, and with keys and values repeated for each query head: it computes all pairs of "
            f"positions, documents or not; install FlashAttention-3, take torch >= 2.11 for varlen, or try "
            "--set run.attention=flex"
        )
    return "warning: " + "; ".join(said) if said else None


def choose_backend(
    choice: BackendChoice, device: torch.device, dtype: torch.dtype, isolated: bool, training: bool = True
) -> Backend:
    """Return the named backend or, for "auto", the fastest that can run. Raises SettingsError, with the reason."""
    if choice == "auto":
        order = AUTO_ISOLATED if isolated else AUTO_PACKED
        return next(BACKENDS[name] for name in order if not BACKENDS[name].unavailable(device, dtype, training))
    reason = BACKENDS[choice].unavailable(device, dtype, training)
    if reason:
        possible = [name for name in get_args(BackendName) if not BACKENDS[name].unavailable(device, dtype, training)]
        raise SettingsError(
            f"run.attention {choice!r} is not available: {reason}",
            hint=f"choose one of {', '.join(possible)}, or 'auto'",
        )
    return BACKENDS[choice]
