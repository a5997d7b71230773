"""Causal attention of the record architecture: grouped queries, partial rotary positions, XSA.

Rotary (Su et al. 2021) turns the first `rope_dims` dimensions of each head, in the challenge's rotation sense
(a' = a·cos + b·sin, b' = -a·sin + b·cos). XSA removes from each head's output its component along the position's own
value vector: what a token says about itself is already in the residual stream.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = torch.finfo(torch.float32).eps  # of the challenge's RMSNorm in float32; not negligible at initialisation


def rms_norm(x: Tensor) -> Tensor:
    """RMSNorm over the last dimension, without a weight."""
    return F.rms_norm(x, (x.size(-1),), eps=NORM_EPS)


def rotary_angles(
    seq_len: int,
    rope_dims: int,
    base: float,
    device: torch.device,
) -> tuple[Tensor, Tensor]:  # cos, sin: (seq_len, rope_dims / 2) float32
    """Angles position · base^(-2k/rope_dims) for k = 0 .. rope_dims/2 - 1."""
    inverse_frequency = base ** (-torch.arange(0, rope_dims, 2, device=device, dtype=torch.float32) / rope_dims)
    angles = torch.outer(torch.arange(seq_len, device=device, dtype=torch.float32), inverse_frequency)
    return angles.cos(), angles.sin()


def apply_rotary(
    x: Tensor,  # (batch, heads, seq_len, head_dim)
    cos: Tensor,  # (seq_len, rope_dims / 2)
    sin: Tensor,  # (seq_len, rope_dims / 2)
) -> Tensor:
    """Rotate the two halves of the first rope_dims dimensions; the rest passes through."""
    half = cos.size(-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), dim=-1)


def remove_own_value(
    y: Tensor,  # (batch, heads, seq_len, head_dim)
    v: Tensor,  # (batch, kv_heads, seq_len, head_dim)
) -> Tensor:
    """XSA: y - (y·v̂)v̂, with v̂ the unit value vector of the same position and key-value group."""
    batch, heads, seq_len, head_dim = y.shape
    grouped = y.view(batch, v.size(1), heads // v.size(1), seq_len, head_dim)
    direction = F.normalize(v, dim=-1).unsqueeze(2)
    return (grouped - (grouped * direction).sum(-1, keepdim=True) * direction).view_as(y)


class Attention(nn.Module):
    """Grouped-query causal attention. Weights are (out, in); `q_gain` scales each head's query."""

    def __init__(
        self,
        model_dim: int,
        num_heads: int,
        num_kv_heads: int,
        q_gain_init: float,
        use_xsa: bool,
    ) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_dim = model_dim // num_heads
        self.use_xsa = use_xsa
        kv_dim = num_kv_heads * self.head_dim
        self.q = nn.Linear(model_dim, model_dim, bias=False)
        self.k = nn.Linear(model_dim, kv_dim, bias=False)
        self.v = nn.Linear(model_dim, kv_dim, bias=False)
        self.proj = nn.Linear(model_dim, model_dim, bias=False)
        self.q_gain = nn.Parameter(torch.full((num_heads,), q_gain_init))

    def _heads(self, x: Tensor, num_heads: int) -> Tensor:  # (batch, heads, seq_len, head_dim)
        return x.unflatten(-1, (num_heads, self.head_dim)).transpose(1, 2)

    def forward(
        self,
        x: Tensor,  # (batch, seq_len, model_dim), normalised
        cos: Tensor,  # (seq_len, rope_dims / 2)
        sin: Tensor,
    ) -> Tensor:  # (batch, seq_len, model_dim)
        q = apply_rotary(rms_norm(self._heads(self.q(x), self.num_heads)), cos, sin)
        k = apply_rotary(rms_norm(self._heads(self.k(x), self.num_kv_heads)), cos, sin)
        v = self._heads(self.v(x), self.num_kv_heads)
        q = q * self.q_gain.to(q.dtype)[:, None, None]
        y = causal_attention(q, k, v)
        if self.use_xsa:
            y = remove_own_value(y, v)
        return self.proj(y.transpose(1, 2).flatten(-2))


def causal_attention(
    q: Tensor,  # (batch, heads, seq_len, head_dim)
    k: Tensor,  # (batch, kv_heads, seq_len, head_dim)
    v: Tensor,
) -> Tensor:  # (batch, heads, seq_len, head_dim)
    """Softmax attention over the past, scale 1/√head_dim; query head h reads key-value head h // group."""
    group = q.size(1) // k.size(1)
    k, v = (t.repeat_interleave(group, dim=1) if group > 1 else t for t in (k, v))
    return F.scaled_dot_product_attention(q, k.to(q.dtype), v.to(q.dtype), is_causal=True)
