"""The divergence of a model with some tensors changed from the view itself, the reference, on training text.

For a model that predicts its text as well as it claims to, the loss that a small error costs is, in expectation, the
Kullback-Leibler divergence between the distributions with and without it, and both are the same quadratic form of the
Fisher information. The divergence is never negative at any token and needs no labels: where the difference of two
losses has noise of many times its mean, the divergence has a tenth of it, and a few windows of text suffice.

It is always in float32: under bfloat16 the rounding of activations, which any change of a weight shuffles, adds a
divergence of 1e-4 nats of its own, as much as quantizing a matrix (docs/results/gpu.md).

The reference's hidden states are kept; its head runs again with every measurement, cheaper than keeping logits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pgolf_post.base.copying import to_device
from pgolf_post.base.divergence import token_divergences
from pgolf_post.base.ranks import ALONE, Ranks
from pgolf_post.calibrate import CalibrationSettings
from pgolf_post.calibrate.text import CalibrationSet, draw_training_text
from pgolf_post.checkpoint import View
from pgolf_post.data import DataFolder
from pgolf_post.errors import NumericsError
from pgolf_post.families import load_module, swap_weights
from pgolf_post.quantize.tensor import QuantizedModel
from pgolf_post.score.pool import CompiledModel

BATCH_TOKENS = {"cpu": 2048, "cuda": 32768}


@dataclass(frozen=True)
class Measured:
    """A mean over windows and its standard error, nats per token."""

    mean: float
    error: float


class Probe:
    """Measures divergences on one text."""

    def __init__(
        self,
        view: View,
        text: CalibrationSet,
        ranks: Ranks = ALONE,
        backend: str | None = None,  # of torch.compile; None: not compiled
    ) -> None:
        self.view, self.text, self.ranks = view, text, ranks
        self.module: Any = load_module(view.config, view.tensors, str(view), copy=True).to(ranks.device)
        self.model: Any = self.module if backend is None else CompiledModel(self.module, backend)
        head = next(site for site in view.family.sites(self.module) if site.is_head)
        self.head = self.module.get_parameter(head.tensors[0])
        self.own_head = self.head.detach().clone()
        size = max(1, BATCH_TOKENS[ranks.device.type] // text.tokens.shape[1])
        tokens = torch.from_numpy(text.tokens)
        self.batches = [(start, tokens[start : start + size]) for start in range(0, len(tokens), size)]
        self.batches = [self.batches[i] for i in ranks.share(range(len(self.batches)))]
        with torch.no_grad():
            self.hidden = [self._hidden(batch) for _, batch in self.batches]

    def divergence(self, tensors: Mapping[str, Tensor]) -> Measured:
        """Return KL(reference ‖ with these tensors in place of its own). Raises NumericsError if it is not finite."""
        swap_weights(self.module, tensors)
        try:
            divergences = self._divergences()
        finally:
            swap_weights(self.module, {name: self.view.tensors[name] for name in tensors})
        count = len(divergences)
        error = float(divergences.std(ddof=1)) / math.sqrt(count) if count > 1 else math.inf
        return Measured(float(divergences.mean()), error)

    @torch.no_grad()
    def _divergences(self) -> np.ndarray:  # (windows,) float64 nats per token
        windows = torch.zeros(len(self.text.tokens), dtype=torch.float64, device=self.ranks.device)
        for (start, batch), hidden in zip(self.batches, self.hidden, strict=True):
            windows[start : start + len(batch)] = self.means(batch, hidden)
        self.ranks.sum_(windows)
        if not torch.isfinite(windows).all():
            raise NumericsError("predictions on calibration text are not finite with quantized weights")
        return windows.cpu().numpy()

    def means(self, batch: Tensor, hidden: Tensor) -> Tensor:  # (windows, seq_len), (…, dim) → (windows,) float64
        """Return each window's mean divergence; `hidden` is the reference's."""
        reference = self._reference_logits(hidden.flatten(0, 1))
        changed = self.model.logits(self._hidden(batch).flatten(0, 1))
        return token_divergences(reference, changed).double().view(len(batch), -1).mean(1)

    def _hidden(self, batch: Tensor) -> Tensor:  # (windows, seq_len) → (windows, seq_len, dim)
        hidden: Tensor = self.model.hidden(to_device(batch, self.ranks.device))
        return hidden

    def _reference_logits(self, hidden: Tensor) -> Tensor:  # (tokens, dim) → (tokens, vocab)
        """Apply the view's own head, whichever is in the module now."""
        now = self.head.detach().clone()
        self.head.copy_(self.own_head)
        logits: Tensor = self.model.logits(hidden)
        self.head.copy_(now)
        return logits


def decoded(model: QuantizedModel) -> dict[str, Tensor]:
    """Return a model's quantized matrices as they decode."""
    return {name: torch.from_numpy(tensor.dequantize()) for name, tensor in model.quantized.items()}


def probe_text(view: View, data: DataFolder, tokens: int, seed: int) -> CalibrationSet:
    """Draw training text by another seed than the statistics'; never more than there is."""
    seq_len = view.train_seq_len
    available = sum(len(shard) // seq_len for _, shard in data.shards("train")) * seq_len
    return draw_training_text(data, CalibrationSettings(tokens=min(tokens, available), seed=seed + 1), seq_len)
