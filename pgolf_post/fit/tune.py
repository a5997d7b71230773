"""Fine-tuning: the model between two roundings, its unquantized reference, and steps on what is still float.

Weights that are not rounded yet, and the parameters that never are (gains, mixes, gates), are tuned for the least
KL(reference ‖ tuned model) on training text. A token says little about millions of weights, so the gain depends on the
amount of text. Weights move by a few hundredths of what rounding will do to them, so steps, sensitivities and κ stay as
they were.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pgolf_post.base.autocast import autocast_dtype, autocast_to
from pgolf_post.base.copying import to_device
from pgolf_post.base.divergence import token_divergences
from pgolf_post.base.progress import progress_bar
from pgolf_post.base.ranks import ALONE, Ranks
from pgolf_post.calibrate.randomness import epochs, generator
from pgolf_post.calibrate.text import CalibrationSet
from pgolf_post.checkpoint import View
from pgolf_post.errors import NumericsError, SettingsError
from pgolf_post.families import load_module, swap_weights
from pgolf_post.fit.build import Builder
from pgolf_post.fit.precondition import RATE_RATIO, STEP_TOKENS, PreconditionedMomentum, Roots, empty_roots
from pgolf_post.quantize.tensor import QuantizedTensor
from pgolf_post.settings import Precision

BATCH_TOKENS = 2048  # at least
MOST_STEPS = 512  # between two blocks: more text makes larger batches
MICRO_TOKENS = {"cpu": 2048, "cuda": 16384}  # twice as many would fill an H100 to the brim
RATE = 0.005  # Adam's at first, relative to the rms error that rounding will make in a weight; cosine to zero
FLOAT_RATE = 1e-3  # Adam's, for parameters that stay float: gains and mixes are about 1
BETAS = (0.9, 0.99)
HELD_OUT, HELD_OUT_TOKENS = 0.125, 16384  # the share of the text that is held out, and how much is enough


def split_text(text: CalibrationSet) -> tuple[CalibrationSet, CalibrationSet]:
    """Return the windows to tune on, and those held out. Raises SettingsError if there is but one."""
    windows, seq_len = text.tokens.shape
    if windows < 2:
        raise SettingsError(
            f"fine-tuning needs a window of text to tune on and another to hold out; there is {windows} of {seq_len}",
            hint="more --calibration-tokens",
        )
    count = min(max(1, round(HELD_OUT * windows)), max(1, HELD_OUT_TOKENS // seq_len))
    order = generator(0, "held-out windows").permutation(windows)
    parts = np.sort(order[count:]), np.sort(order[:count])
    tune_text, held_out = (CalibrationSet((), np.ascontiguousarray(text.tokens[part])) for part in parts)
    return tune_text, held_out


def learning_rates(builder: Builder, constants: Mapping[str, float]) -> dict[str, float]:
    """Return a learning rate per matrix: a small share of what rounding at c/√κ will do to its weights."""
    return {name: RATE * builder.rounding_error(name, constant) for name, constant in constants.items()}


class TunedModel:
    """The model as it is after some of its blocks were rounded, and its reference."""

    def __init__(
        self,
        view: View,
        text: CalibrationSet,
        tokens_between: int,
        precision: Precision = "fp32",
        ranks: Ranks = ALONE,  # whose gradients are added up
        roots: Mapping[str, Roots] | None = None,  # of every matrix, to precondition by; None: Adam
    ) -> None:
        self.view, self.ranks, self.device = view, ranks, ranks.device
        self.roots = None if roots is None else {name: one.to(self.device) for name, one in roots.items()}
        self.autocast = autocast_dtype(precision, self.device)
        self.tokens = torch.from_numpy(text.tokens)  # (windows, seq_len) int64
        seq_len = self.tokens.shape[1]
        batch_tokens = max(BATCH_TOKENS if roots is None else STEP_TOKENS, tokens_between // MOST_STEPS)
        self.batch = min(len(self.tokens), max(1, batch_tokens // seq_len))  # windows
        self.steps = max(1, tokens_between // (self.batch * seq_len))
        self.micro = max(1, MICRO_TOKENS[self.device.type] // seq_len)
        self.batches, self.taken = epochs(len(self.tokens), self.batch, 0, "fine-tuning"), 0
        self.reference: Any = load_module(view.config, view.tensors, str(view)).to(self.device)
        self.module: Any = load_module(view.config, view.tensors, str(view), copy=True).to(self.device)
        self.parameters = dict(self.module.named_parameters())

    def weights(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Return some matrices as they are now."""
        return {name: self.parameters[name].detach().float().cpu().clone() for name in names}

    def load(self, quantized: Mapping[str, QuantizedTensor], names: Sequence[str]) -> None:
        """Put rounded matrices in."""
        decoded = {name: torch.from_numpy(np.ascontiguousarray(quantized[name].dequantize())) for name in names}
        swap_weights(self.module, decoded)

    def put(self, weights: Mapping[str, Tensor]) -> None:
        """Put other weights in."""
        swap_weights(self.module, weights)

    def skip(self, weights: Mapping[str, Tensor]) -> None:
        """Take over the weights that an earlier call of `tune` came to, and pass over the batches that it read."""
        self.put(weights)
        self.pass_over(self.steps)

    def pass_over(self, batches: int) -> None:
        """Leave out batches that were read before."""
        for _ in range(batches):
            self._next_batch()

    def _next_batch(self) -> Tensor:  # (windows,) int64
        self.taken += 1
        return torch.from_numpy(next(self.batches))

    @torch.no_grad()
    def share_weights(self) -> None:
        """Give every rank the weights of rank 0."""
        for parameter in self.parameters.values():
            if not self.ranks.is_main:
                parameter.zero_()
            self.ranks.sum_(parameter)

    def share_roots(self, names: Iterable[str]) -> None:
        """Give every rank the roots that rank 0 has of these matrices, if any; the others' are replaced."""
        if self.roots is None:
            return
        for name in names:
            own = self.roots[name] if self.ranks.is_main else empty_roots(self.parameters[name])
            for side in (own.outputs, own.inputs):
                self.ranks.sum_(side)
            self.roots[name] = own

    def tune(self, rates: Mapping[str, float], label: str, floats: Sequence[str] = ()) -> None:
        """Tune some matrices, each at its own rate, and floats. Raises NumericsError if the loss is not finite."""
        # Only these learn, all by one cosine.
        chosen = [self.parameters[name].requires_grad_(True) for name in (*rates, *floats)]
        optimizers = self.optimizers(rates, floats)
        schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, self._share_of_rate) for optimizer in optimizers]

        # A step's KL is read when the next step is queued, so that a GPU never waits for this process.
        before: Tensor | None = None
        with progress_bar(f"fine-tuning after block {label}", self.steps, "steps") as advance:
            for _ in range(self.steps):
                for parameter in chosen:
                    parameter.grad = None
                kl = self.backward(self._next_batch())
                for optimizer, schedule in zip(optimizers, schedules, strict=True):
                    optimizer.step()
                    schedule.step()
                advance(note="" if before is None else f"KL {_finite(before):.5f}")
                before = kl
        if before is not None:
            _finite(before)

        # The next call chooses others.
        for parameter in chosen:
            parameter.requires_grad_(False)
            parameter.grad = None

    def _share_of_rate(self, step: int) -> float:
        return 0.5 + 0.5 * math.cos(math.pi * step / self.steps)

    def optimizers(self, rates: Mapping[str, float], floats: Sequence[str] = ()) -> list[torch.optim.Optimizer]:
        """Return the optimizers of some matrices and floats. Floats have no roots, so Adam moves them."""
        groups = [{"params": [self.parameters[name]], "lr": rate} for name, rate in rates.items()]
        by_adam = [{"params": [self.parameters[name] for name in floats], "lr": FLOAT_RATE}] if floats else []
        found: list[torch.optim.Optimizer] = []
        if self.roots is None:
            by_adam += groups
        elif groups:
            found.append(PreconditionedMomentum(_preconditioned(rates, self.parameters, self.roots)))
        if by_adam:
            on_gpu = self.device.type == "cuda"
            found.append(torch.optim.Adam(by_adam, lr=0.0, betas=BETAS, eps=1e-12, fused=on_gpu or None))
        return found

    def backward(self, chosen: Tensor) -> Tensor:  # (windows,) int64 → ()
        """Add the gradients of the mean KL(reference ‖ tuned) over some windows; returns that mean, nats per token.

        Each rank reads its share of the windows; mean and gradients are those of all of them, on every rank.
        """
        total = torch.zeros((), device=self.device)
        own = chosen[self.ranks.rank :: self.ranks.world_size]
        for part in own.split(self.micro) if len(own) else ():
            tokens = to_device(self.tokens[part], self.device)
            with torch.enable_grad():
                with autocast_to(self.device, self.autocast):
                    with torch.no_grad():
                        reference = self.reference.logits(self.reference.hidden(tokens))
                    tuned = self.module.logits(self.module.hidden(tokens))
                kl = token_divergences(reference, tuned).mean() * (len(part) / len(chosen))
                kl.backward()
            total += kl.detach()
        self._add_up(total)
        return total

    def _add_up(self, total: Tensor) -> None:
        """Replace a sum, and all gradients, by those of all ranks; a rank without windows has no gradients yet."""
        if self.ranks.world_size == 1:
            return
        learning = [parameter for parameter in self.parameters.values() if parameter.requires_grad]
        for parameter in learning:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            self.ranks.sum_(parameter.grad)
        self.ranks.sum_(total)


def _preconditioned(
    rates: Mapping[str, float],  # Adam's
    parameters: Mapping[str, Tensor],
    roots: Mapping[str, Roots],
) -> list[dict[str, Any]]:
    """Return groups of one matrix each, for steps along its roots, longer than Adam's."""
    return [
        {"params": [parameters[name]], "lr": RATE_RATIO * rate, "roots": roots[name]} for name, rate in rates.items()
    ]


def _finite(kl: Tensor) -> float:
    """Return the number. Raises NumericsError if it is none."""
    value = kl.item()
    if not math.isfinite(value):
        raise NumericsError("predictions on calibration text are not finite with quantized weights")
    return value
