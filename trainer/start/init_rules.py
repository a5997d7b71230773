"""Rules by which tensors of a model start from those of another one: copied, widened, repeated, new, or dropped.

    copied      the same shape. Where a layer moved and ln_scale is on, what reads its input is scaled for the new
                place, so that the product stays: layer i's input is divided by √(i + 1)
    widened     the old block in the corner; old rows read zero of new columns, new rows start by the model's own init
    repeated    key-value heads: each head of a group gets the weights of the head that its queries read before
    identity    a new layer: its output projections are zero, the rest starts by the model's own init
    new, fresh  the model's own init, said apart where it is zero

Whatever no rule covers is refused: a vocabulary, buckets of a hash, a width that shrinks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from pgolf_post.errors import MismatchError
from trainer.model.architecture import ModelConfig
from trainer.model.controls import norm_scale
from trainer.model.layers import mlp_widths
from trainer.model.visits import looped_layers
from trainer.start.init_layers import SkipRows
from trainer.start.init_settings import IDENTITY

LAYER = re.compile(r"(blocks|override_mlps)\.(\d+)(.*)")
READS_INPUT = re.compile(r"\.attn\.(v\.weight|gate|double_gate)|(_p\d+|\.mlp)\.(fc|gate)\.weight")
KV_ROWS = re.compile(r".*\.attn\.[kv]\.weight|value_embed\.proj\.weight")
TABLES = ("tok_emb.weight", "value_embed.embed.weight", "token_type.embed.weight")  # lookups: new columns are not zero
BY_LAYER = ("parallel_post_lambdas", "parallel_resid_lambdas")
GROWING = ("model_dim", "num_heads", "bigram_dim", "trigram_dim", "value_embed_dim", "token_type_dim")
GROWING_TOO = ("head_residual_rank", "gate_window")


@dataclass(frozen=True)
class TensorStart:
    """The start of one tensor."""

    tensor: str
    rule: str
    there: tuple[int, ...] | None  # shape in the base; None where it lacks the tensor
    here: tuple[int, ...] | None  # None where it is dropped
    origin: str | None = None  # name in the base
    factor: float = 1.0  # of the base's values


@dataclass(frozen=True)
class Pair:
    """Two models: the one that a run starts from, and the run's own, with the origin of each of its layers."""

    base: ModelConfig
    config: ModelConfig
    layers: Sequence[int]
    skips: SkipRows
    fresh: tuple[str, ...] = ()

    def growths(self) -> set[tuple[int, int]]:
        """Return the (old, new) sizes that an axis may have grown from and to."""
        sizes = [(getattr(self.base, key), getattr(self.config, key)) for key in (*GROWING, *GROWING_TOO)]
        sizes += [(_embedding_dim(self.base), _embedding_dim(self.config))]
        old, new = mlp_widths(self.base), mlp_widths(self.config)
        sizes += [(old[origin], new[layer]) for layer, origin in enumerate(self.layers) if origin != IDENTITY]
        if self.config.num_kv_heads != self.base.num_kv_heads and self.heads_grow():
            sizes.append((_kv_dim(self.base), _kv_dim(self.config)))
        return {(a, b) for a, b in sizes if isinstance(a, int) and isinstance(b, int) and b > a}

    def heads_grow(self) -> bool:
        """Return whether all old heads stay what they were: their width, and the key-value head that they read."""
        old, new = (config.num_heads // config.num_kv_heads for config in (self.base, self.config))
        one = self.base.num_kv_heads == self.config.num_kv_heads == 1
        return _head_dim(self.base) == _head_dim(self.config) and (old == new or one)

    def kv_repeats(self) -> int:
        """Return how often each key-value head is repeated; 0 where heads change otherwise."""
        old, new = self.base, self.config
        alike = old.num_heads == new.num_heads and old.model_dim == new.model_dim
        return new.num_kv_heads // old.num_kv_heads if alike and not new.num_kv_heads % old.num_kv_heads else 0

    def input_ratio(self, layer: int) -> float:
        """Return the factor of what reads a layer's input, by which its products stay where the layer moved."""
        return norm_scale(self.base, self.layers[layer]) / norm_scale(self.config, layer)


def _head_dim(config: ModelConfig) -> int:
    return config.model_dim // config.num_heads


def _kv_dim(config: ModelConfig) -> int:
    return _head_dim(config) * config.num_kv_heads


def _embedding_dim(config: ModelConfig) -> int:
    return config.embedding_dim or config.model_dim


def start_values(
    own: Mapping[str, Tensor],  # the model's own init
    theirs: Mapping[str, Tensor],  # the base's weights
    pair: Pair,
) -> tuple[dict[str, Tensor], list[TensorStart]]:
    """Return the values of all tensors, and the rule that each follows. Raises MismatchError listing all offenders."""
    values: dict[str, Tensor] = {}
    rows: list[TensorStart] = []
    refused: list[str] = []
    for name, start in own.items():
        origin = None if is_fresh(name, pair.fresh) else origin_of(name, theirs, pair)
        there = None if origin is None else theirs[origin]
        value, rule = (start, _own_rule(name, start, pair)) if there is None else _started(name, start, there, pair)
        if value is None:
            refused.append(f"{name} {_shape(start)} from {origin} {_shape(there)}: {rule}")
            continue
        values[name] = value
        shape = None if there is None else tuple(there.shape)
        rows.append(TensorStart(name, rule, shape, tuple(start.shape), origin, _factor(name, there, pair)))
    if refused:
        raise MismatchError(
            f"no rule covers {len(refused)} tensor{'s' * (len(refused) != 1)}: " + "; ".join(refused),
            hint="take the base's settings, or start these anew: --set 'init.fresh=[\"PATTERN\"]'",
        )
    used = {row.origin for row in rows} | {name for name in own if is_fresh(name, pair.fresh)}
    rows += [
        TensorStart(name, "dropped", tuple(tensor.shape), None, name)
        for name, tensor in theirs.items()
        if name not in used
    ]
    return values, rows


def is_fresh(name: str, patterns: Iterable[str]) -> bool:
    """Return whether a tensor starts by the model's own init although the base has it."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def origin_of(name: str, theirs: Mapping[str, Tensor], pair: Pair) -> str | None:
    """Return the base's tensor that one starts from, None where it has none."""
    if match := LAYER.fullmatch(name):
        kind, layer, rest = match[1], int(match[2]), match[3]
        if pair.layers[layer] == IDENTITY:
            return None
        found = f"{kind}.{pair.layers[layer]}{rest}"
        if found not in theirs and kind == "override_mlps":  # tied so far: the block's own MLP
            found = f"blocks.{pair.layers[layer]}.mlp{re.sub(r'^_p[0-9]+', '', rest)}"
        return found if found in theirs else None
    if name not in theirs and name == "lm_head.weight":  # tied so far
        return "tok_emb.weight"
    return name if name in theirs else None


def _own_rule(name: str, start: Tensor, pair: Pair) -> str:
    """Return the rule of a tensor that starts by the model's own init."""
    if is_fresh(name, pair.fresh):
        return "fresh"
    match = LAYER.fullmatch(name)
    zero = " zero" if not start.any() else ""
    if match and pair.layers[int(match[2])] == IDENTITY:
        return f"new layer, identity:{zero or ' own init'}"
    return f"new:{zero or ' own init'}"


def _started(name: str, own: Tensor, there: Tensor, pair: Pair) -> tuple[Tensor | None, str]:
    """Return the value of a tensor that the base has, and its rule; None, and why, where no rule covers it."""
    there = there.to(own.dtype)
    for kinds, rule in INDEXED:
        if name in kinds:
            return rule(own, there, pair)
    factor = _factor(name, there, pair)
    scaled, told = (there, "") if factor == 1.0 else (there * factor, ", scaled for its new place")
    if own.shape == there.shape:
        return scaled, f"copied{told}"
    if KV_ROWS.fullmatch(name) and (times := pair.kv_repeats()) > 1 and own.shape[1:] == there.shape[1:]:
        heads = scaled.unflatten(0, (-1, _head_dim(pair.base)))
        return heads.repeat_interleave(times, 0).flatten(0, 1), f"each head repeated {times} times{told}"
    why = _why_not_widened(own, there, pair)
    return (None, why) if why else (_widened(name, own, scaled), f"widened{told}")


def _factor(name: str, there: Tensor | None, pair: Pair) -> float:
    """Return what a tensor of the base is multiplied by, so that a layer that moved computes what it did."""
    match = LAYER.fullmatch(name)
    if there is None or match is None:
        return 1.0
    ratio = pair.input_ratio(int(match[2]))
    if match[3] == ".attn.x0_share":
        return 1.0 / ratio
    return ratio if READS_INPUT.fullmatch(match[3]) else 1.0


def _why_not_widened(own: Tensor, there: Tensor, pair: Pair) -> str | None:
    """Return why a tensor is not widened, None if it is."""
    if own.ndim != there.ndim:
        return "another number of axes"
    grown = {(old, new) for old, new in zip(there.shape, own.shape, strict=True) if old != new}
    if any(new < old for old, new in grown):
        return "it would lose rows or columns"
    if unknown := grown - pair.growths():
        old, new = min(unknown)
        return f"no setting widens {old} to {new} with what they hold kept in place"
    there_and_here = ((config.model_dim, config.num_heads) for config in (pair.base, pair.config))
    if len(set(there_and_here)) > 1 and not pair.heads_grow():
        return "heads would change their width, or the key-value head that they read: keep model_dim ÷ num_heads"
    return None


def _widened(name: str, own: Tensor, there: Tensor) -> Tensor:
    """Return the old block in the corner: old rows have zero in new columns of a matrix, new rows their own init."""
    value = own.clone()
    if own.ndim == 2 and name not in TABLES and name.endswith(".weight"):
        value[: there.size(0), there.size(1) :] = 0
    value[tuple(slice(size) for size in there.shape)] = there
    return value


# ---- tensors whose rows stand for visits and layers ---------------------------------------------------------------


def _skips(own: Tensor, there: Tensor, pair: Pair) -> tuple[Tensor | None, str]:
    """Rows of skips go to the visits that had them. New rows are zero, or with gates their own init."""
    if there.size(1) > own.size(1):
        return None, "it would lose rows or columns"
    value = own.clone() if pair.config.skip_gates else torch.zeros_like(own)
    moved = {row: origin for row in range(len(own)) if (origin := pair.skips.origin.get(row)) is not None}
    for row, origin in moved.items():
        value[row] = own[row]
        value[row, : there.size(1)] = there[origin]
    kept = all(row == origin for row, origin in moved.items()) and len(moved) == len(own) == len(there)
    if kept:
        return value, "copied" if own.shape == there.shape else "widened"
    new = "own init" if pair.config.skip_gates else "zero"
    placed = ", ".join(f"{origin} → {row}" for row, origin in moved.items()) or "none"
    return value, f"rows moved: {placed}; others {new}"


def _lanes(own: Tensor, there: Tensor, pair: Pair) -> tuple[Tensor | None, str]:
    """Rows of lanes go with their layers; those of new layers are one, which keeps a lane as it is."""
    value = torch.stack([torch.ones_like(own[0]) if at == IDENTITY else there[at] for at in pair.layers])
    return value, "copied" if own.shape == there.shape and torch.equal(value, there) else "rows moved with their layers"


def _value_scales(own: Tensor, there: Tensor, pair: Pair) -> tuple[Tensor | None, str]:
    """Scales of value embeddings go with their layers."""
    rows = {layer: row for row, layer in enumerate(pair.base.value_embed_layers)}
    value = own.clone()
    for row, layer in enumerate(pair.config.value_embed_layers):
        origin = pair.layers[layer] if layer < len(pair.layers) else None
        if origin in rows:
            value[row] = there[rows[origin]]
    return value, "copied" if own.shape == there.shape and torch.equal(value, there) else "rows moved with their layers"


def _carry(own: Tensor, there: Tensor, pair: Pair) -> tuple[Tensor | None, str]:
    """Coefficients of a carry are those of the same looped layers."""
    looped = [pair.layers[layer] for layer in looped_layers(pair.config)]
    if own.shape != there.shape or looped != looped_layers(pair.base):
        return None, "other layers are visited again, or another number of times"
    return there, "copied"


Rule = Callable[[Tensor, Tensor, Pair], tuple[Tensor | None, str]]
INDEXED: tuple[tuple[tuple[str, ...], Rule], ...] = (
    (("skip_weights", "skip_gates"), _skips),
    (BY_LAYER, _lanes),
    (("value_embed.layer_scales",), _value_scales),
    (("recur_beta", "recur_alpha"), _carry),
)


def _shape(tensor: Tensor | None) -> str:
    return "×".join(map(str, tensor.shape)) or "scalar" if tensor is not None else ""
