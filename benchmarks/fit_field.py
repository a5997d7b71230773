"""The field that `fit` is compared with: models on one sample of validation windows, and the record's recipe re-tuned.

The recipe is tuned as a careful contestant would who has our probe: each of the three groups (embedding, attention,
MLP) is quantized alone, the divergence it causes on training text is measured, and its k is set so that every weight
causes the same, twice over.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from pgolf_post.base.progress import progress_bar, say
from pgolf_post.calibrate import Stats
from pgolf_post.calibrate.text import CalibrationSet
from pgolf_post.checkpoint import View
from pgolf_post.data import DataFolder
from pgolf_post.families import load_module, train_seq_len
from pgolf_post.fit.probe import Probe, probe_text
from pgolf_post.pack.report.compare import compare
from pgolf_post.plan import read_plan
from pgolf_post.quantize.model import quantize_view
from pgolf_post.quantize.tensor import QuantizedModel
from pgolf_post.score.compare.expected import score_against
from pgolf_post.score.compare.paired import pair, share_interval, t_interval
from pgolf_post.score.plain import PlainProtocol, protocol_windows
from pgolf_post.score.spans import Span

RECORD_K = {"embedding": 14.0, "attention": 13.0, "mlp": 11.5}
GROUP_OF = {"q": "attention", "k": "attention", "v": "attention", "attn_proj": "attention"}
GROUP_OF |= {"mlp_fc": "mlp", "mlp_proj": "mlp", "embedding": "embedding", "head": "embedding"}
RECORD_BITS, LEAST_K = {"embedding": 7, "attention": 6, "mlp": 6}, 6.0
CLOSE, TUNING_ROUNDS, KL_WINDOWS = 0.0005, 2, 64


@dataclass
class Bench:
    """One checkpoint, one calibration, one sample of validation windows."""

    view: View
    stats: Stats
    data: DataFolder
    val: DataFolder
    num_windows: int
    all_scored: bool = True  # else those rows alone that the goal is about

    def __post_init__(self) -> None:
        seq_len = train_seq_len(self.view.config)
        self.tokens = self.val.tokens("val", None)
        self.token_bytes = self.val.token_bytes("val", self.tokens)
        self.spans = protocol_windows(self.tokens, PlainProtocol(seq_len=seq_len))
        random, count = np.random.default_rng(0), min(self.num_windows, len(self.spans))
        self.chosen = np.sort(random.choice(len(self.spans), count, replace=False))
        few = random.choice(self.chosen, min(KL_WINDOWS, count), replace=False)
        rows = [self.tokens[start : start + length] for start, length in (self.spans[i] for i in np.sort(few))]
        self.eyes = Probe(self.view, CalibrationSet((), np.stack(rows).astype(np.int64)))
        self.tuner = Probe(self.view, probe_text(self.view, self.data, 16384, 0))
        self.scored: dict[str, Mapping[str, torch.Tensor]] = {}  # rows whose gaps are wanted

    def row(self, name: str, model: QuantizedModel, num_bytes: int, scored: bool | None = None) -> dict[str, Any]:
        """Print a model's bytes and divergence; its gaps come with `gaps`."""
        decoded = tensors_of(model)
        kl = self.eyes.divergence(decoded)
        if self.all_scored if scored is None else scored:
            self.scored[name] = decoded
        print(f"| {name} | {num_bytes:,} | {kl.mean:.6f} |", flush=True)
        return {"name": name, "bytes": num_bytes, "kl": kl.mean}

    def gaps(self, compared: Sequence[tuple[str, str]] = ()) -> None:
        """Print every scored row's gap, measured and expected, from one pass over the windows; then shares of gaps."""
        reference, *models = (
            load_module(self.view.config, tensors, name)
            for name, tensors in {"unquantized": self.view.tensors, **self.scored}.items()
        )
        spans = [Span(start, length, length) for start, length in self.spans]
        with progress_bar("scoring", len(self.chosen)) as advance:
            found = score_against(reference, models, self.tokens, self.token_bytes, spans, self.chosen, advance=advance)
        own = found.reference
        nothing = replace(own, unit_nats=np.zeros_like(own.unit_nats))
        documents = len(own.document_nats)
        print(f"\nunquantized {own.bpb:.5f} bpb, {own.tokens:,} tokens in {documents} documents\n")
        print("|  | bpb | gap, bpb | 95 % | expected gap | 95 % |\n|---|---|---|---|---|---|")
        both = {}
        for name, loss, divergence in zip(self.scored, found.losses, found.divergences, strict=True):
            both[name] = pair(loss, own), pair(divergence, nothing)
            gaps = [t_interval(clusters) for clusters in both[name]]
            cells = [f"{gap.bpb:+.5f} | {gap.low:+.5f} … {gap.high:+.5f}" for gap in gaps]
            print("| " + " | ".join([name, f"{loss.bpb:.5f}", *cells]) + " |", flush=True)
        print("\n|  | of | gap | 95 %, paired | expected gap | 95 %, paired |\n|---|---|---|---|---|---|")
        for first, second in compared:
            shares = [share_interval(*sides) for sides in zip(both[first], both[second], strict=True)]
            cells = [f"{share:.3f} | {low:.3f} … {high:.3f}" for share, low, high in shares]
            print("| " + " | ".join([first, second, *cells]) + " |")


def tensors_of(model: QuantizedModel) -> dict[str, torch.Tensor]:
    """What the decoder gives."""
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in model.tensors().items()}


def field_bytes(model: QuantizedModel, codecs: Sequence[str] = ("brotli", "lrzip")) -> int:
    """The smaller of what contestants use."""
    found = compare(model, codecs)
    return min(row.artifact_bytes for row in found.rows)


# ---- the recipe, re-tuned --------------------------------------------------------------------------------------------


def recipe(bench: Bench, k: Mapping[str, float], lqer: bool = True) -> QuantizedModel:
    """The record's recipe with other k, and with a bit more where k would clip weights that matter."""
    changes = []
    for group, value in k.items():
        bits, own = RECORD_BITS[group], value
        if value < LEAST_K:  # one bit more, the same step
            bits, own = bits + 1, value * (2**bits - 1) / (2 ** (bits - 1) - 1)
        changes += [f"{group}.clip={own}", f"{group}.bits={bits}"]
    plan = read_plan("record-1855", changes + ([] if lqer else ["lqer.top_k=0"]))
    return quantize_view(bench.view, bench.stats, plan)


def tuned_k(bench: Bench) -> dict[str, float]:
    """k such that every weight of the three groups causes the same divergence, at the same entropy as RECORD_K."""
    k = dict(RECORD_K)
    for _ in range(TUNING_ROUNDS):
        model = recipe(bench, k, lqer=False)
        weights: dict[str, int] = dict.fromkeys(k, 0)
        groups: dict[str, dict[str, torch.Tensor]] = {group: {} for group in k}
        for name, tensor in model.quantized.items():
            role = str(tensor.facts["role"])
            if role in GROUP_OF:
                group = GROUP_OF[role]
                weights[group] += tensor.symbols.size
                groups[group][name] = torch.from_numpy(tensor.dequantize())
        each = {group: bench.tuner.divergence(tensors).mean / weights[group] for group, tensors in groups.items()}
        total = sum(weights.values())
        mean = math.exp(sum(weights[g] * math.log(each[g]) for g in k) / total)
        k = {group: k[group] * math.sqrt(mean / each[group]) for group in k}
        say(f"k re-tuned: {k}")
    return k


def recipe_at(bench: Bench, k: Mapping[str, float], target: int) -> tuple[QuantizedModel, int, dict[str, float]]:
    """The recipe with every k times one number, at `target` bytes."""
    factor = 1.0
    for _ in range(6):
        now = {group: value * factor for group, value in k.items()}
        model = recipe(bench, now)
        size = field_bytes(model)
        if abs(size / target - 1) <= CLOSE:
            break
        weights = sum(tensor.symbols.size for tensor in model.quantized.values())
        factor *= 2 ** ((size - target) * 8 / weights)
    return model, size, now
