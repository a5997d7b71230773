"""Sums of a watched forward pass: norms, shares, units and heads of every block's visits."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pgolf_post.watching import Branch

Key = tuple[int, int, int]  # layer, visit, stream

QUERIES = 64  # of each window, evenly spaced: attention is summed over these
LEAST_REACH = 4  # tokens that a query must be able to see to count
FIRES = 0.0  # a unit's input above this counts as positive


@dataclass
class UnitSums:
    """The hidden units of one MLP, over all visits that run it."""

    layer: int
    largest: Tensor  # (units,) largest absolute output
    positive: Tensor  # (units,) number of tokens with an input above 0
    tokens: int = 0


@dataclass
class HeadSums:
    """The heads of one visit's attention: sums over the sampled queries."""

    entropy: Tensor  # (heads,) nats
    entropy_share: Tensor  # (heads,) entropy by log of the number of tokens in reach
    sharpness: Tensor  # (heads,) largest weight
    first: Tensor  # (heads,) weight on the first token in the window
    similarity: Tensor  # (heads, heads) cosine of two heads' weights
    queries: int = 0


@dataclass
class ActivationWatch:
    """The watcher (see `pgolf_post.watching`) of a diagnosis. Everything is kept on the CPU."""

    before: dict[Key, list[Tensor]] = field(default_factory=lambda: defaultdict(list))  # norms, each (tokens,)
    after: dict[Key, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    shares: dict[tuple[int, int, Branch], list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    units: dict[str, UnitSums] = field(default_factory=dict)
    heads: dict[tuple[int, int], HeadSums] = field(default_factory=dict)
    _entered: list[Tensor] = field(default_factory=list)  # norms of the visit that the pass is in, one per stream

    def enters(self, layer: int, visit: int, streams: Sequence[Tensor]) -> None:
        self._entered = [token_norms(stream) for stream in streams]
        for number, norms in enumerate(self._entered):
            self.before[layer, visit, number].append(norms)

    def adds(self, layer: int, visit: int, branch: Branch, addition: Tensor) -> None:
        own = self._entered[0] if branch == "attention" else self._entered[-1]
        self.shares[layer, visit, branch].append(token_norms(addition) / own.clamp(min=1e-30))

    def leaves(self, layer: int, visit: int, streams: Sequence[Tensor]) -> None:
        for number, stream in enumerate(streams):
            self.after[layer, visit, number].append(token_norms(stream))

    def fires(self, mlp: str, layer: int, inputs: Tensor, outputs: Tensor) -> None:
        largest = outputs.detach().flatten(0, -2).float().abs().amax(dim=0).cpu()
        positive = (inputs.detach().flatten(0, -2) > FIRES).sum(dim=0).cpu()
        sums = self.units.get(mlp)
        if sums is None:
            sums = self.units[mlp] = UnitSums(layer, torch.zeros_like(largest), torch.zeros_like(positive))
        sums.largest = torch.maximum(sums.largest, largest)
        sums.positive = sums.positive + positive
        sums.tokens += inputs.shape[:-1].numel()

    def attends(self, layer: int, visit: int, q: Tensor, k: Tensor, within: Tensor | None) -> None:
        chosen = sampled_queries(q.size(2), q.device)
        weights, reach = attention_weights(q, k, within, chosen)
        counted = reach >= min(LEAST_REACH, q.size(2))  # (batch, 1, queries)
        if not counted.any():
            return
        found = head_sums(weights, reach, counted)
        known = self.heads.get((layer, visit))
        self.heads[layer, visit] = found if known is None else added(known, found)


def token_norms(x: Tensor) -> Tensor:  # (batch, seq_len, dim) → (batch · seq_len,) float32
    """Return each token's norm."""
    return x.detach().float().norm(dim=-1).flatten().cpu()


def sampled_queries(seq_len: int, device: torch.device) -> Tensor:  # (queries,) int64, ascending
    """Return at most QUERIES positions, evenly spaced, the last one included."""
    count = min(QUERIES, seq_len)
    return torch.linspace(seq_len - 1, 0, count, device=device).round().long().flip(0)


def attention_weights(
    q: Tensor,  # (batch, heads, seq_len, head_dim)
    k: Tensor,  # (batch, kv_heads, seq_len, head_dim)
    within: Tensor | None,  # (batch, 1, seq_len, seq_len) bool
    chosen: Tensor,  # (queries,) positions
) -> tuple[Tensor, Tensor]:
    """Return causal attention weights (batch, heads, queries, seq_len) and tokens in reach (batch, 1, queries)."""
    keys = k.repeat_interleave(q.size(1) // k.size(1), dim=1).float()
    scores = q[:, :, chosen].float() @ keys.transpose(-1, -2) * q.size(-1) ** -0.5
    visible = torch.arange(q.size(2), device=q.device) <= chosen[:, None]  # (queries, seq_len)
    mask = visible.expand(q.size(0), 1, -1, -1) if within is None else within[:, :, chosen] & visible
    weights = torch.softmax(scores.masked_fill(~mask, float("-inf")), dim=-1)
    return weights, mask.sum(dim=-1)


def head_sums(
    weights: Tensor,  # (batch, heads, queries, seq_len)
    reach: Tensor,  # (batch, 1, queries)
    counted: Tensor,  # (batch, 1, queries) bool
) -> HeadSums:
    """Return the sums of one batch over the queries that count."""
    use = counted.float()

    def total(values: Tensor) -> Tensor:  # (batch, heads, queries) → (heads,)
        return (values * use).sum(dim=(0, 2)).double().cpu()

    entropy = torch.special.entr(weights).sum(dim=-1)
    unit = torch.nn.functional.normalize(weights, dim=-1) * use.unsqueeze(-1)
    return HeadSums(
        entropy=total(entropy),
        entropy_share=total(entropy / reach.clamp(min=2).float().log()),
        sharpness=total(weights.amax(dim=-1)),
        first=total(weights[..., 0]),
        similarity=torch.einsum("bhqs,bgqs->hg", unit, unit).double().cpu(),
        queries=int(counted.sum()),
    )


def added(one: HeadSums, other: HeadSums) -> HeadSums:
    """Return the sums of two batches together."""
    return HeadSums(
        entropy=one.entropy + other.entropy,
        entropy_share=one.entropy_share + other.entropy_share,
        sharpness=one.sharpness + other.sharpness,
        first=one.first + other.first,
        similarity=one.similarity + other.similarity,
        queries=one.queries + other.queries,
    )
