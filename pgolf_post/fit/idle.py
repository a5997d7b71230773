"""Matrices that a fit stores as zeros, because zeros cost nothing: no step size follows from a loss of nothing.

There are two kinds. A matrix may hold zeros already: a projection that starts at zero and has not been trained. Or the
loss does not depend on it: everything that reads its output is zero, or its inputs are. At step 0 both come together:
the projections hold zeros, so no gradient reaches the matrices before them. Such parts take a few bytes, and the bytes
of the budget go to the others.

That the loss does not depend on a matrix is known from calibration text. So where κ is measured, on other text, all of
them are replaced by zeros at once, and a divergence that is not negligible is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from pgolf_post.errors import NumericsError
from pgolf_post.fit.probe import Probe
from pgolf_post.fit.sensitivity import Sensitivity
from pgolf_post.quantize.tensor import QuantizedTensor, ScaleFactor

NEGLIGIBLE_NATS = 1e-9  # per token, predicted: a budget's loss is a million times as much
SEEN_NATS = 1e-6  # per token, measured: rounding in float32 stays below it


def zeros_loss(weight: Tensor, sensitivity: Sensitivity) -> float:  # (out, in) → nats per token
    """Return the predicted loss of zeros in a matrix's place, rows taken as independent."""
    return replace(sensitivity, coupling=None).loss(weight)


def least_zeros_loss(weight: Tensor, sensitivity: Sensitivity) -> float:  # (out, in) → nats per token
    """Return what `zeros_loss` cannot be below, without its matrix product."""
    return 0.5 * sensitivity.least * float(sensitivity.rows @ weight.square().sum(1, dtype=torch.float64))


def zeros_reason(weight: Tensor, sensitivity: Sensitivity) -> str:
    """Return why a matrix is stored as zeros; empty if it is not."""
    if not weight.any():
        return "it holds zeros only"
    if not float(sensitivity.moments.trace()):
        return "the loss does not depend on it"
    if least_zeros_loss(weight, sensitivity) > NEGLIGIBLE_NATS:
        return ""
    return "the loss hardly depends on it" if zeros_loss(weight, sensitivity) <= NEGLIGIBLE_NATS else ""


def as_zeros(name: str, role: str, tensor: Tensor, loss: float, reason: str) -> QuantizedTensor:
    """Return a matrix of zeros in the tensor's place, with the evidence."""
    weight = tensor.reshape(1, -1) if tensor.ndim < 2 else tensor.flatten(1)
    symbols = np.zeros(tuple(weight.shape), np.int8)
    facts = {"method": "zeros", "role": role, "weights": weight.numel(), "entropy_bits": 0.0}
    facts |= {"predicted_loss": loss, "reason": reason}
    return QuantizedTensor(
        name, symbols, (ScaleFactor("tensor", np.ones(1, np.float16)),), tuple(tensor.shape), facts=facts
    )


def require_idle(probe: Probe, zeros: Mapping[str, QuantizedTensor]) -> None:
    """Raise NumericsError if text that calibration did not see depends on matrices that are stored as zeros."""
    if not zeros:
        return
    changed = probe.divergence({name: torch.from_numpy(tensor.dequantize()) for name, tensor in zeros.items()})
    if changed.mean > SEEN_NATS:
        raise NumericsError(
            f"calibration text does not depend on {', '.join(zeros)}, but other training text does: with zeros there, "
            f"predictions diverge by {changed.mean:.3g} nats per token",
            hint="calibrate on more text: --calibration-tokens",
        )
