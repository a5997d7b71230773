"""The loss on a few windows of training text, for weights that differ from the view's in some tensors.

Differences are always taken window by window against the view's own weights: the windows' spread, a thousand times any
difference that matters here, cancels. Each error is tried with both signs: half the sum of L(W + E) - L(W) and
L(W - E) - L(W) is free of the term linear in E, which is noise of either sign and much larger than the quadratic one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pgolf_post.calibrate.text import CalibrationSet
from pgolf_post.checkpoint import View
from pgolf_post.errors import NumericsError
from pgolf_post.families import load_module
from pgolf_post.ranks import ALONE, Ranks
from pgolf_post.score.nats import target_nats
from pgolf_post.score.pool import swap_weights

BATCH_TOKENS = {"cpu": 2048, "cuda": 32768}


@dataclass(frozen=True)
class Measured:
    """A mean over windows and its standard error, nats per token."""

    mean: float
    error: float


class Probe:
    """Measures losses on one text."""

    def __init__(self, view: View, text: CalibrationSet, ranks: Ranks = ALONE) -> None:
        self.view, self.text, self.ranks = view, text, ranks
        owned = {name: tensor.clone() for name, tensor in view.tensors.items()}  # a module shares what it is given
        self.module = load_module(view.config, owned, str(view)).to(ranks.device)
        self.own = self._nats()  # (windows,) of the view's own weights

    @property
    def num_tokens(self) -> int:
        """That one pass reads."""
        return int(self.text.tokens.size)

    def difference(self, tensors: Mapping[str, Tensor]) -> Measured:
        """The loss with these tensors in place of the view's, less the view's own."""
        return _mean(self._with(tensors) - self.own)

    def curvature(self, errors: Mapping[str, Tensor]) -> Measured:
        """The part of the loss that is even in these errors: ½·(L(W + E) + L(W - E)) - L(W)."""
        plus = self._with({name: self.view.tensors[name] + error for name, error in errors.items()})
        minus = self._with({name: self.view.tensors[name] - error for name, error in errors.items()})
        return _mean((plus + minus) / 2 - self.own)

    def _with(self, tensors: Mapping[str, Tensor]) -> np.ndarray:  # (windows,)
        swap_weights(self.module, tensors)
        try:
            return self._nats()
        finally:
            swap_weights(self.module, {name: self.view.tensors[name] for name in tensors})

    @torch.no_grad()
    def _nats(self) -> np.ndarray:  # (windows,) float64 nats per token
        device, tokens = self.ranks.device, torch.from_numpy(self.text.tokens)
        size = max(1, BATCH_TOKENS[device.type] // tokens.size(1))
        found = torch.zeros(len(tokens), dtype=torch.float64, device=device)
        for start in self.ranks.share(range(0, len(tokens), size)):
            batch = tokens[start : start + size].to(device)
            hidden = self.module.hidden(batch[:, :-1]).flatten(0, 1)  # type: ignore[operator]
            nats = target_nats(self.module, hidden, batch[:, 1:].flatten())
            found[start : start + size] = nats.double().view(len(batch), -1).mean(1)
        self.ranks.sum_(found)
        if not torch.isfinite(found).all():
            raise NumericsError("the loss on calibration text is not finite with quantized weights")
        return found.cpu().numpy()


def _mean(differences: np.ndarray) -> Measured:
    count = len(differences)
    error = float(differences.std(ddof=1)) / math.sqrt(count) if count > 1 else math.inf
    return Measured(float(differences.mean()), error)


Report = Callable[[int], object]
