"""Causal attention of the record architecture: grouped queries, partial rotary, value extras, XSA, head gates.

Rotary (Su et al. 2021) turns the first `rope_dims` dimensions of each head, in the challenge's rotation sense
(a' = a·cos + b·sin, b' = -a·sin + b·cos). XSA removes from each head's output its component along the position's own
value vector: what a token says about itself is already in the residual stream. A head gate scales each head's output by
a sigmoid of the attention input, so that a head can stay silent where it has nothing to say. The older line helps the
values instead: a token embedding added on some layers, and a mix with the values of the first visit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.model.architecture import ModelConfig
from trainer.model.attention_backends import Reach
from trainer.model.controls import Controls
from trainer.model.layers import has_xsa, query_gains, rotations
from trainer.model.norms import at_least_float32, rms_norm, scaled_norm
from trainer.model.past import Past

NORMALIZE_EPS = 1e-12  # of F.normalize


def rotary_angles(
    seq_len: int,
    rope_dims: int,
    base: float,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:  # cos, sin: (seq_len, rope_dims / 2)
    """Return cosines and sines of the angles position · base^(-2k/rope_dims) for k = 0 .. rope_dims/2 - 1."""
    inverse_frequency = base ** (-torch.arange(0, rope_dims, 2, device=device, dtype=dtype) / rope_dims)
    angles = torch.outer(torch.arange(seq_len, device=device, dtype=dtype), inverse_frequency)
    return angles.cos(), angles.sin()


def apply_rotary(
    x: Tensor,  # (batch, heads, seq_len, head_dim)
    cos: Tensor,  # (seq_len, rope_dims / 2)
    sin: Tensor,  # (seq_len, rope_dims / 2)
) -> Tensor:
    """Rotate the two halves of the first rope_dims dimensions; the rest passes through."""
    half = cos.size(-1)
    if not half:
        return x
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), dim=-1)


def whole_angles(
    cos: Tensor,  # (seq_len, rope_dims / 2)
    sin: Tensor,  # (seq_len, rope_dims / 2)
    head_dim: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # (seq_len, 1, head_dim), or cos and sin as they are
    """Return what `rotate_whole` multiplies a head and its swapped halves by, if rope_dims divides head_dim."""
    half = cos.size(-1)
    if not half or head_dim % (2 * half):
        return cos.to(dtype), sin.to(dtype)
    rest = cos.new_ones(len(cos), head_dim - 2 * half)
    own, other = torch.cat((cos, cos, rest), dim=-1), torch.cat((sin, -sin, 0 * rest), dim=-1)
    return own.to(dtype)[:, None], other.to(dtype)[:, None]


def rotate_whole(
    x: Tensor,  # (batch, seq_len, heads, head_dim)
    cos: Tensor,  # (seq_len, 1, head_dim), or as `apply_rotary` takes it
    sin: Tensor,  # (seq_len, 1, head_dim)
    rope_dims: int,
) -> Tensor:
    """Return `apply_rotary` of heads beside positions, without joining pieces: a compiler then makes it one kernel.

    The halves of every rope_dims dimensions are swapped; where nothing turns, what came of that is multiplied by 0.
    """
    if cos.ndim == 2:
        return apply_rotary(x, cos[:, None], sin[:, None])
    swapped = x.unflatten(-1, (-1, 2, rope_dims // 2)).flip(-2).flatten(-3)
    return x * cos + swapped * sin


def remove_own_value(
    y: Tensor,  # (batch, heads, seq_len, head_dim)
    v: Tensor,  # (batch, kv_heads, seq_len, head_dim)
) -> Tensor:
    """Return y - (y·v̂)v̂ (XSA), with v̂ the unit value vector of the same position and key-value group."""
    grouped = y.unflatten(1, (v.size(1), -1))
    direction = F.normalize(v, dim=-1).unsqueeze(2)
    return (grouped - (grouped * direction).sum(-1, keepdim=True) * direction).view_as(y)


def remove_own_value_at_once(
    y: Tensor,  # (batch, seq_len, heads, head_dim)
    v: Tensor,  # (batch, seq_len, kv_heads, head_dim)
) -> Tensor:
    """Return `remove_own_value` of heads beside positions as y - (y·v / v·v) v, which a compiler makes one kernel.

    Both sums are over a head of y, v repeated for each: no unit vector is written and read again.
    """
    grouped = y.unflatten(2, (v.size(2), -1)).to(at_least_float32(y.dtype))
    own = v.unsqueeze(3).expand(grouped.shape).to(grouped.dtype)
    share = (grouped * own).sum(-1, keepdim=True) / own.square().sum(-1, keepdim=True).clamp_min(NORMALIZE_EPS**2)
    return (grouped - share * own).to(y.dtype).view_as(y)


class Context:
    """Inputs that all attentions of one forward pass share: rotary angles, value extras, who attends to whom."""

    def __init__(
        self,
        angles: Sequence[tuple[Tensor, Tensor]],  # of each layer: cos, sin, each (seq_len, rope_dims / 2)
        reach: Reach,
        value_embeddings: Mapping[int, Tensor],  # layer → (batch, seq_len, kv_dim)
        past: Past | None = None,  # then angles are those of the new tokens, document that of all
        x0: Tensor | None = None,  # (batch, seq_len, model_dim), the embedding
    ) -> None:
        self.angles = angles
        self.reach = reach
        self.value_embeddings = value_embeddings
        self.earlier_value: Tensor | None = None  # (batch, kv_heads, seq_len, head_dim), of the first or the last visit
        self.past, self.x0 = past, x0
        self.spread_out: dict[str, Tensor] = {}

    def spread(self, name: str, parameter: Tensor, shape: Sequence[int]) -> Tensor:
        """Return a parameter expanded over positions: for one name, one tensor in the whole pass.

        Visits that share it add their gradients up, position by position, and one sum over positions ends them all.
        """
        if name not in self.spread_out:
            self.spread_out[name] = parameter.expand(*shape)
        return self.spread_out[name]


class Attention(nn.Module):
    """Grouped-query causal attention. Weights are (out, in); `q_gain` scales each head's query."""

    # Where `stack_projections` was called: the weights of q, k and v as one, gains of queries and ones for keys.
    qkv: nn.Parameter | None
    qk_gain: nn.Parameter | None  # none either where places have gains of their own

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.use_xsa = has_xsa(config, layer, config.num_layers)
        self.reads_x0 = layer in config.value_x0_layers
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim = config.model_dim // config.num_heads
        kv_dim = config.num_kv_heads * self.head_dim
        self.q = nn.Linear(config.model_dim, config.model_dim, bias=False)
        self.k = nn.Linear(config.model_dim, kv_dim, bias=False)
        self.v = nn.Linear(config.model_dim, kv_dim, bias=False)
        self.proj = nn.Linear(config.model_dim, config.model_dim, bias=False)
        self.register_parameter("qkv", None)
        self.register_parameter("qk_gain", None)
        self.q_gain = nn.Parameter(torch.tensor(query_gains(config)[layer]))
        if config.xsa_alpha is not None and self.use_xsa:
            self.xsa_alpha = nn.Parameter(torch.tensor(config.xsa_alpha).logit())
        if self.reads_x0:
            self.x0_share = nn.Parameter(torch.tensor(config.value_x0_init))
        if config.attn_gate != "none":
            width = config.model_dim if config.attn_gate == "dense" else config.gate_window
            gate = nn.Parameter(torch.zeros(config.num_heads, width))
            self.register_parameter(self._gate_name(), gate)
        if config.value_residual:
            earlier = config.value_residual_init
            self.value_mix = nn.Parameter(torch.tensor([earlier, 1.0 - earlier]))  # of earlier values, of its own

    @property
    def heads_dim(self) -> int:
        """Dimension of heads, as this attention holds them: beside positions only where projections are stacked."""
        return 1 + (self.qkv is not None)

    def _heads(self, x: Tensor, num_heads: int) -> Tensor:  # (batch, heads, seq_len, head_dim); see heads_dim
        # Of dimensions 1 and 2 the other is that of positions: exchanging it with 1 does nothing where it is 1 already.
        return x.unflatten(-1, (num_heads, self.head_dim)).transpose(1, 3 - self.heads_dim)

    def _turned(
        self,
        pieces: Sequence[Tensor],  # products of q and of k, each (batch, seq_len, width); or one of both
        gain: Tensor,  # (num_heads,), of queries; where all pieces are one, perhaps followed by ones
        place: int,  # whose gain it is
        context: Context,
    ) -> tuple[Tensor, Tensor]:  # (batch, heads, seq_len, head_dim), of queries and of keys; see heads_dim
        """Return queries and keys: heads, normalised, rotated, and queries times their gains."""
        numbers, angles = (self.num_heads, self.num_kv_heads), context.angles[self.layer]
        if self.heads_dim == 1:
            heads = [rms_norm(self._heads(flat, number)) for flat, number in zip(pieces, numbers, strict=True)]
            q, k = (apply_rotary(one, *angles) for one in heads)
            return q * gain.to(q.dtype).view(-1, 1, 1), k
        split = self._heads(pieces[0], sum(numbers))
        gains = F.pad(gain, (0, sum(numbers) - len(gain)), value=1.0).unsqueeze(-1)
        normed = scaled_norm(split, context.spread(f"gains {place}", gains, (*split.shape[:-1], 1)))
        return rotate_whole(normed, *angles, rotations(self.config)[self.layer][0]).split(numbers, dim=2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """Attend, whatever the dimension of heads."""
        return context.reach.attend(*(x.transpose(1, self.heads_dim) for x in (q, k, v))).transpose(1, self.heads_dim)

    def _gate_name(self) -> str:
        """Return the gate parameter's name; double-sigmoid gates, which mean something else, have their own."""
        return "double_gate" if self.config.attn_gate == "double_sigmoid" else "gate"

    def _gate(self, x: Tensor, query: Tensor) -> Tensor:  # (batch, heads, seq_len, 1)
        """Return each head's gate at each position, from the attention input x or the raw query projection."""
        kind, weight = self.config.attn_gate, self.get_parameter(self._gate_name())
        source = query if kind == "double_sigmoid" and self.config.attn_gate_source == "query" else x
        logits = F.linear(source[..., : weight.size(1)], weight.to(source.dtype))
        if kind == "sparse":
            logits = self.config.attn_gate_scale * logits
        gates = torch.sigmoid(logits) * (2.0 if kind == "double_sigmoid" else 1.0)
        return gates.transpose(1, 3 - self.heads_dim).unsqueeze(-1)

    def stack_projections(self) -> dict[str, tuple[nn.Parameter, slice]]:
        """Make one product of q, k and v; return the parameter and its rows that each weight, and q's gain, now is.

        Sums of a product may come in another order then. Nothing happens where values have an input of their own, or a
        weight does not learn; gains stay where every place has its own.
        """
        weights = {name: self.get_parameter(name) for name in ("q.weight", "k.weight", "v.weight")}
        if self.reads_x0 or not all(weight.requires_grad for weight in weights.values()):
            return {}
        self.qkv = nn.Parameter(torch.cat([weight.detach() for weight in weights.values()]))
        held, begin = {}, 0
        for name, weight in weights.items():
            held[name] = self.qkv, slice(begin, begin := begin + len(weight))
            del self.get_submodule(name[0]).weight  # it would get no gradient
        if self.q_gain.requires_grad and not self.config.visit_controls:
            self.qk_gain = nn.Parameter(F.pad(self.q_gain.detach(), (0, self.num_kv_heads), value=1.0))
            held["q_gain"] = self.qk_gain, slice(self.num_heads)
            del self.q_gain
        return held

    def query_weight(self) -> Tensor:  # (model_dim, model_dim), differentiable
        """Return the weight of the query projection."""
        return self.q.weight if self.qkv is None else self.qkv[: self.q.out_features]

    def _project(self, x: Tensor, context: Context) -> tuple[list[Tensor], Tensor]:  # each (batch, seq_len, width)
        """Return the products of q and k, as one where they are stacked, and that of v, which may read x0 too."""
        if self.qkv is not None:
            width = self.v.out_features
            both, value = F.linear(x, self.qkv).split((len(self.qkv) - width, width), dim=-1)
            return [both], value
        read = x
        if self.reads_x0:
            assert context.x0 is not None
            read = x + self.x0_share.to(x.dtype) * rms_norm(context.x0).to(x.dtype)
        return [self.q(x), self.k(x)], self.v(read)

    def _values(
        self,
        flat: Tensor,  # (batch, seq_len, kv_dim), projected
        context: Context,
        place: int,
    ) -> Tensor:  # (batch, kv_heads, seq_len, head_dim)
        """Return projected values plus the token's value embedding, mixed with those of an earlier visit.

        The first visit's own values are not mixed.
        """
        if place in context.value_embeddings:
            flat = flat + context.value_embeddings[place].to(flat.dtype)
        v = self._heads(flat, self.num_kv_heads)
        if not self.config.value_residual:
            return v
        earlier = context.earlier_value
        if earlier is not None:
            mix = self.value_mix.to(v.dtype)
            v = mix[0] * earlier + mix[1] * v
        if earlier is None or self.config.value_residual_from == "previous":
            context.earlier_value = v
        return v

    def _without_own_value(self, y: Tensor, v: Tensor) -> Tensor:  # (batch, heads, seq_len, head_dim)
        """Return y with its own value removed, or the layer's learned share of it."""
        rest = remove_own_value(y, v) if self.heads_dim == 1 else remove_own_value_at_once(y, v)
        if self.config.xsa_alpha is None:
            return rest
        return torch.lerp(y, rest, torch.sigmoid(self.xsa_alpha).to(y.dtype))

    def forward(
        self,
        x: Tensor,  # (batch, seq_len, model_dim), normalised
        context: Context,
        controls: Controls | None = None,  # of a place that has its own; else the layer's
    ) -> Tensor:  # (batch, seq_len, model_dim)
        gain, use_xsa, place = (
            (self.q_gain if self.qk_gain is None else self.qk_gain, self.use_xsa, self.layer)
            if controls is None
            else (controls.q_gain, controls.use_xsa, controls.place)
        )
        pieces, value = self._project(x, context)
        q, k = self._turned(pieces, gain, place, context)
        v = self._values(value, context, place)
        keys, values = (k, v) if context.past is None else context.past.extend(k, v)
        y = self._attend(q, keys, values, context)
        if use_xsa:
            y = self._without_own_value(y, v)
        if self.config.attn_gate != "none":
            y = y * self._gate(x, pieces[0][..., : self.q.out_features])
        return self.proj(y.transpose(1, 3 - self.heads_dim).flatten(-2))
