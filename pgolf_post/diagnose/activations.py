"""Activations in numbers: one pass of training text through the model, watched."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pgolf_post.base.progress import progress_bar
from pgolf_post.base.ranks import ALONE
from pgolf_post.checkpoint import View
from pgolf_post.diagnose.inputs import InputWatch, percentile
from pgolf_post.diagnose.numbers import Number, number
from pgolf_post.diagnose.watch import ActivationWatch, HeadSums, UnitSums
from pgolf_post.families import load_module

BATCH_TOKENS = 2048
NEAR_CAP = 0.9
DEAD_SHARE = 1e-3  # of the median unit's largest output
SATURATED_SHARE = 0.995  # of tokens at which a unit's input is positive
LISTED = 8  # units named in a note
LOGITS_AT_ONCE = 512


@dataclass
class LogitSums:
    """Logits near the cap."""

    cap: float
    largest: float = 0.0
    near: int = 0
    tokens_near: int = 0
    logits: int = 0
    tokens: int = 0

    def add(self, logits: Tensor) -> None:  # (tokens, vocab_size)
        """Take in some logits."""
        absolute = logits.detach().abs()
        top = logits.detach().amax(dim=-1)
        self.largest = max(self.largest, float(absolute.max()))
        self.near += int((absolute > NEAR_CAP * self.cap).sum())
        self.tokens_near += int((top > NEAR_CAP * self.cap).sum())
        self.logits += logits.numel()
        self.tokens += len(logits)

    def numbers(self) -> list[Number]:
        """Return the numbers of the logits."""
        return [
            number("logit_max", "logits", self.largest / self.cap),
            number("softcap_share", "logits", self.near / self.logits),
            number("softcap_top_share", "logits", self.tokens_near / self.tokens),
        ]


def on_device(view: View) -> nn.Module:
    """Return the view's model on this process's device."""
    return load_module(view.config, view.tensors, str(view)).to(ALONE.device)


def batches(tokens: Tensor, size: int) -> Iterator[Tensor]:  # (windows, seq_len) → (batch, seq_len) each
    """Yield windows in batches of about `size` tokens."""
    count = max(1, size // tokens.size(1))
    yield from tokens.split(count)


@torch.no_grad()
def activation_numbers(view: View, module: Any, tokens: Tensor) -> list[Number]:  # (windows, seq_len) int64
    """Return the numbers of one pass of text through a view's model, a LanguageModel."""
    family = view.family
    watch, inputs, cap = ActivationWatch(), InputWatch(family.sites(module)), family.logit_cap(module)
    logits = None if cap is None else LogitSums(cap)
    with progress_bar("watching activations", len(tokens), "windows") as advance:
        for batch in batches(tokens.to(ALONE.device), BATCH_TOKENS):
            with family.watch(module, watch), inputs.watching(module):
                hidden = module.hidden(batch)
            inputs.add_head(hidden)
            for part in hidden.flatten(0, -2).split(LOGITS_AT_ONCE) if logits else ():
                logits.add(module.logits(part))  # type: ignore[union-attr]
            advance(len(batch))
    found = [*_residual(watch), *inputs.numbers(family), *_units(watch), *_attention(watch)]
    return found + (logits.numbers() if logits else [])


def visit_name(watch: ActivationWatch, layer: int, visit: int) -> str:
    """Return a visit's name: the block, and which visit where there are several."""
    several = any(key[0] == layer and key[1] > 1 for key in watch.before)
    return f"block {layer}, visit {visit}" if several else f"block {layer}"


def _residual(watch: ActivationWatch) -> Iterator[Number]:
    """Yield norms before and after every visit, by lane where there are two, and what attention and MLP add."""
    for (layer, visit, stream), parts in watch.before.items():
        in_lanes = (layer, visit, 1) in watch.before
        subject = visit_name(watch, layer, visit) + (f", lane {stream}" if in_lanes else "")
        places = {"layer": layer, "visit": visit}
        for side, norms in (("before", torch.cat(parts)), ("after", torch.cat(watch.after[layer, visit, stream]))):
            mean, high = float(norms.mean()), percentile(norms, 0.99)
            yield number(f"norm_{side}", subject, mean, **places)
            yield number(f"norm_{side}_p99", subject, high, **places)
        yield number("norm_tail", subject, high / mean if mean > 0 else None, **places)
    for (layer, visit, branch), shares in watch.shares.items():
        subject = visit_name(watch, layer, visit)
        yield number(f"{branch}_share", subject, float(torch.cat(shares).mean()), layer=layer, visit=visit)


def _units(watch: ActivationWatch) -> Iterator[Number]:
    for mlp, sums in watch.units.items():
        for metric, units in (("dead_units", dead_units(sums)), ("saturated_units", saturated_units(sums))):
            note = ", ".join(map(str, units[:LISTED])) + (", …" if len(units) > LISTED else "")
            first = units[0] if units else None
            yield number(metric, mlp, float(len(units)), layer=sums.layer, at=first, note=note)


def dead_units(sums: UnitSums) -> list[int]:
    """Return the units whose largest output stays below a thousandth of the median unit's."""
    return (sums.largest <= DEAD_SHARE * sums.largest.median()).nonzero().flatten().tolist()


def saturated_units(sums: UnitSums) -> list[int]:
    """Return the units whose input is positive at nearly every token."""
    return (sums.positive >= SATURATED_SHARE * sums.tokens).nonzero().flatten().tolist()


def _attention(watch: ActivationWatch) -> Iterator[Number]:
    for (layer, visit), sums in watch.heads.items():
        for head in range(len(sums.entropy)):
            yield from _head(sums, head, f"{visit_name(watch, layer, visit)}, head {head}", layer, visit)


def _head(sums: HeadSums, head: int, subject: str, layer: int, visit: int) -> Iterator[Number]:
    places = {"layer": layer, "visit": visit}
    for metric, total in (
        ("attention_entropy", sums.entropy),
        ("attention_entropy_share", sums.entropy_share),
        ("attention_sharpness", sums.sharpness),
        ("first_token_share", sums.first),
    ):
        yield number(metric, subject, float(total[head]) / sums.queries, **places)
    if len(sums.entropy) > 1:
        others = sums.similarity[head].clone()
        others[head] = -1.0
        nearest = int(others.argmax())
        yield number("head_similarity", subject, float(others[nearest]) / sums.queries, at=nearest, **places)
