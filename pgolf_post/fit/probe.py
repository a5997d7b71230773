"""The divergence of a model with some tensors changed from the view itself, the reference, on training text.

For a model that predicts its text as well as it claims to, the loss that a small error costs is, in expectation, the
Kullback-Leibler divergence between the distributions with and without it, and both are the same quadratic form of the
Fisher information. The divergence is never negative at any token and needs no labels: where the difference of two
losses has noise of many times its mean, the divergence has a tenth of it, and a few windows of text suffice.

It is always in float32: under bfloat16 the rounding of activations, which any change of a weight shuffles, adds a
divergence of 1e-4 nats of its own, as much as quantizing a matrix (docs/results/gpu.md).

The reference's hidden states are kept; its head runs once for all models that are measured together, batch by batch.
Those models share what the changed weights leave alone (shared_calls.py), unless the model is compiled.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf_post.base.copying import to_device
from pgolf_post.base.divergence import divergences_of
from pgolf_post.base.ranks import ALONE, Ranks
from pgolf_post.calibrate.text import CalibrationSet, draw_windows, training_tokens
from pgolf_post.checkpoint import View
from pgolf_post.data import DataFolder
from pgolf_post.errors import NumericsError
from pgolf_post.families import load_module, swap_weights
from pgolf_post.fit.shared_calls import SharedCalls
from pgolf_post.quantize.tensor import QuantizedModel, QuantizedTensor
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
        size = max(1, BATCH_TOKENS[ranks.device.type] // text.tokens.shape[1])
        tokens = torch.from_numpy(text.tokens)
        self.batches = [(start, tokens[start : start + size]) for start in range(0, len(tokens), size)]
        self.batches = [self.batches[i] for i in ranks.share(range(len(self.batches)))]
        with torch.no_grad():
            self.hidden = [self._hidden(batch) for _, batch in self.batches]

    def divergence(self, tensors: Mapping[str, Tensor]) -> Measured:
        """Return KL(reference ‖ with these tensors in place of its own). Raises NumericsError if it is not finite."""
        return self.divergences([tensors])[0]

    @torch.no_grad()
    def divergences(
        self,
        changes: Sequence[Mapping[str, Tensor]],  # of each model, the tensors in place of the reference's
        advance: Callable[[], object] = lambda: None,  # called after each pass of a model over a batch
    ) -> list[Measured]:
        """Return KL(reference ‖ model) of several models. Raises NumericsError if one is not finite."""
        device, count = self.ranks.device, len(self.text.tokens)
        windows = torch.zeros(len(changes), count, dtype=torch.float64, device=device)  # nats per token
        for (start, batch), hidden in zip(self.batches, self.hidden, strict=True):
            reference = self.log_probabilities(hidden)
            shared = SharedCalls(self.module, lambda: self._hidden(batch)) if self._shares(changes) else None  # noqa: B023
            for model, tensors in zip(windows, changes, strict=True):
                with self._swapped(tensors), shared.given(tensors) if shared else contextlib.nullcontext():
                    model[start : start + len(batch)] = self.means(batch, reference)
                advance()
        self.ranks.sum_(windows)
        if not torch.isfinite(windows).all():
            raise NumericsError("predictions on calibration text are not finite with quantized weights")
        return [_measured(of_model) for of_model in windows.cpu().numpy()]

    def log_probabilities(self, hidden: Tensor) -> Tensor:  # (windows, seq_len, dim) → (tokens, vocab) float32
        """Return the predictions that follow from hidden states, by the head that is in the module now."""
        return F.log_softmax(self.model.logits(hidden.flatten(0, 1)).float(), -1)

    def means(self, batch: Tensor, reference: Tensor) -> Tensor:  # (windows, seq_len), (tokens, vocab) → (windows,)
        """Return each window's mean divergence, float64; `reference` holds the reference's log probabilities."""
        changed = self.log_probabilities(self._hidden(batch))
        return divergences_of(reference, changed).double().view(len(batch), -1).mean(1)

    def _shares(self, changes: Sequence[Mapping[str, Tensor]]) -> bool:
        return len(changes) > 1 and self.model is self.module

    @contextlib.contextmanager
    def _swapped(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Put tensors in place of the module's own inside the block."""
        swap_weights(self.module, tensors)
        try:
            yield
        finally:
            swap_weights(self.module, {name: self.view.tensors[name] for name in tensors})

    def _hidden(self, batch: Tensor) -> Tensor:  # (windows, seq_len) → (windows, seq_len, dim)
        hidden: Tensor = self.model.hidden(to_device(batch, self.ranks.device))
        return hidden


def _measured(windows: np.ndarray) -> Measured:  # (windows,) nats per token
    """Return the mean over windows and its error."""
    count = len(windows)
    error = float(windows.std(ddof=1)) / math.sqrt(count) if count > 1 else math.inf
    return Measured(float(windows.mean()), error)


def decoded(quantized: Mapping[str, QuantizedTensor]) -> dict[str, Tensor]:
    """Return quantized matrices as they decode."""
    return {name: torch.from_numpy(tensor.dequantize()) for name, tensor in quantized.items()}


def as_stored(model: QuantizedModel) -> dict[str, Tensor]:
    """Return all of a model's tensors as they decode, floats too."""
    return {name: torch.from_numpy(array) for name, array in model.tensors().items()}


def probe_text(view: View, data: DataFolder, tokens: int, seed: int) -> CalibrationSet:
    """Draw training text by another seed than the statistics'; never more than there is."""
    seq_len = view.train_seq_len
    return draw_windows(data, min(tokens, training_tokens(data, seq_len)), seed + 1, seq_len)
