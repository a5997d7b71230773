"""Fine-tuning between blocks: matrices not rounded yet learn to make up for those that are.

GPTQ feeds the error of a column into later columns of its matrix, and from both sides into later rows. Here it goes
into later matrices: blocks are rounded in the order of the forward pass, and between two of them everything that is
still float is tuned for the least KL(teacher ‖ student) on the calibration text; the teacher is the unquantized model.
(QuIP#, arXiv 2402.04396, tunes the rest of a block like this, against the block's own output.) What is outside the
blocks (embedding, head, projections) is rounded with the first. No byte is spent: the same steps round other weights.

A token says little about millions of weights, so the gain is one of text: on a 4.6M-parameter model 130,000 tokens take
14 % off what the first block and the embedding cost, 650,000 take 24 %. Weights move by a few hundredths of what
rounding will do to them, so steps, sensitivities and κ stay as they were.

Bytes come out a little different than without, so c of what is left follows the bytes of what is done, and the last
block's c is searched until the artifact fills its budget again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pgolf_post.base.divergence import token_divergences
from pgolf_post.base.progress import progress_bar, say
from pgolf_post.base.ranks import ALONE
from pgolf_post.calibrate.randomness import epochs, generator
from pgolf_post.calibrate.text import CalibrationSet
from pgolf_post.checkpoint import View
from pgolf_post.errors import NumericsError, SettingsError
from pgolf_post.families import load_module, swap_weights
from pgolf_post.fit.build import Builder, constants_of
from pgolf_post.fit.solve import WINDOW_BYTES, Build, Search, Solution
from pgolf_post.fit.training_clock import TrainingClock
from pgolf_post.fit.tune_partial import Done, TunePartial
from pgolf_post.pack.container import pack
from pgolf_post.pack.report.predict import predict_bytes
from pgolf_post.quantize.sequential import blocks_in_order
from pgolf_post.quantize.tensor import QuantizedTensor

STEP_NAME = "fine-tuning"
BATCH_TOKENS = 2048  # at least
MOST_STEPS = 512  # between two blocks: more text makes larger batches
MICRO_TOKENS = {"cpu": 2048, "cuda": 32768}
RATE = 0.005  # Adam's at first, relative to the rms error that rounding will make in a weight; cosine to zero
BETAS = (0.9, 0.99)
HELD_OUT, HELD_OUT_TOKENS = 0.125, 16384  # the share of the text that judges, and how much is enough
LAST_TRIES = 8
LARGEST_STEP = 0.5  # octaves of c


def split_text(text: CalibrationSet) -> tuple[CalibrationSet, CalibrationSet]:
    """The windows to tune on, and those that judge it. Raises SettingsError if there is but one."""
    windows, seq_len = text.tokens.shape
    if windows < 2:
        raise SettingsError(
            f"fine-tuning needs a window of text to tune on and another to hold out; there is {windows} of {seq_len}",
            hint="more --calibration-tokens",
        )
    count = min(max(1, round(HELD_OUT * windows)), max(1, HELD_OUT_TOKENS // seq_len))
    order = generator(0, "held-out windows").permutation(windows)
    parts = np.sort(order[count:]), np.sort(order[:count])
    lesson, exam = (CalibrationSet((), np.ascontiguousarray(text.tokens[part])) for part in parts)
    return lesson, exam


def stages_of(view: View, names: Sequence[str]) -> list[list[str]]:
    """Matrices in the order in which they are rounded: block by block, the others with the first."""
    module = load_module(view.config, view.tensors, str(view))
    blocks = blocks_in_order(module, view.family)
    stages = [[name for site in sites for name in site.tensors if name in names] for _, sites in blocks]
    inside = {name for stage in stages for name in stage}
    others = [name for name in names if name not in inside]
    first, *rest = [stage for stage in stages if stage] or [[]]
    return [others + first, *rest]


def fine_tuned(
    builder: Builder,
    search: Search,
    solution: Solution,  # what the budget takes without
    limit: int,
    text: CalibrationSet,
    tokens: int,
    clock: TrainingClock,
    partial: TunePartial,
) -> Solution | None:
    """The solution built again with fine-tuning between its blocks; None, said aloud, if that does not fit the limit.

    Raises NumericsError if predictions are not finite.
    """
    stages = stages_of(builder.view, list(builder.parts))
    student = Student(builder.view, text, tokens // max(1, len(stages) - 1))
    spare = len(solution.data) - predict_bytes(solution.model)  # what the predictor does not see
    done: dict[str, QuantizedTensor] = {}
    before = partial.resume()
    spent_seconds = before.seconds
    targets: dict[str, Tensor] = {}  # what was rounded
    constant = solution.constant
    for number, names in enumerate(stages[:-1]):
        targets |= {name: before.weights[name] for name in names} if number < before.blocks else student.weights(names)
        done |= builder.quantize(constants_of(names, constant, search.kappa), {name: targets[name] for name in names})
        student.load(done, names)
        rest = [name for stage in stages[number + 1 :] for name in stage]
        excess = predict_bytes(builder.model({**solution.model.quantized, **done})) + spare - _aim(limit)
        constant = solution.constant * 2 ** _octaves(excess, builder, rest)
        if number < before.blocks:
            student.skip({name: before.weights[name] for name in rest})
            continue
        with clock.step(STEP_NAME) as step:
            step.add(spent_seconds)
            student.tune(_rates(builder, constants_of(rest, constant, search.kappa)), f"{number + 1} of {len(stages)}")
        spent_seconds = clock.seconds[STEP_NAME]
        partial.save(Done(number + 1, spent_seconds, {**targets, **student.weights(rest)}))
    return _finished(builder, search, solution, done, student.weights(stages[-1]), constant, limit)


def _finished(
    builder: Builder,
    search: Search,
    solution: Solution,
    done: Mapping[str, QuantizedTensor],
    weights: Mapping[str, Tensor],  # of the last block
    constant: float,
    limit: int,
) -> Solution | None:
    """The last block at the c for which everything fits."""
    best: Solution | None = None
    tries: list[Build] = []
    for _ in range(LAST_TRIES):
        last = builder.quantize(constants_of(weights, constant, search.kappa), weights)
        model = builder.model({**done, **last})
        data = pack(model, search.packing)
        tries.append(Build(constant, len(data), True))
        if len(data) <= limit and (best is None or len(data) > len(best.data)):
            best = replace(solution, model=model, data=data)
        if best is not None and len(best.data) >= limit - WINDOW_BYTES:
            break
        constant *= 2 ** _octaves(len(data) - _aim(limit), builder, list(weights))
    if best is None:
        smallest = min(found.num_bytes for found in tries)
        say(f"fine-tuned blocks do not fit: {smallest:,} of {limit:,} bytes; the untuned ones stay")
        return None
    return replace(best, tries=(*solution.tries, *tries))


def _aim(limit: int) -> float:
    return limit - WINDOW_BYTES / 2


def _octaves(excess: float, builder: Builder, names: Sequence[str]) -> float:
    """By how much c must rise for some matrices to lose so many bytes: N/8 bytes an octave."""
    weights = sum(builder.parts[name].num_weights for name in names)
    return max(-LARGEST_STEP, min(LARGEST_STEP, 8 * excess / weights))


def _rates(builder: Builder, constants: Mapping[str, float]) -> dict[str, float]:
    """Learning rates: a small share of what rounding will do to a matrix's weights."""
    return {name: RATE * builder.rounding_error(name, constant) for name, constant in constants.items()}


class Student:
    """The model as it is after some of its blocks were rounded, and its teacher."""

    def __init__(self, view: View, text: CalibrationSet, tokens_between: int) -> None:
        self.view, self.device = view, ALONE.device
        self.tokens = torch.from_numpy(text.tokens)  # (windows, seq_len) int64
        seq_len = self.tokens.shape[1]
        batch_tokens = max(BATCH_TOKENS, tokens_between // MOST_STEPS)
        self.batch = min(len(self.tokens), max(1, batch_tokens // seq_len))  # windows
        self.steps = max(1, tokens_between // (self.batch * seq_len))
        self.micro = max(1, MICRO_TOKENS[self.device.type] // seq_len)
        self.batches = epochs(len(self.tokens), self.batch, 0, "fine-tuning")
        self.teacher: Any = load_module(view.config, view.tensors, str(view)).to(self.device)
        self.module: Any = load_module(view.config, view.tensors, str(view), copy=True).to(self.device)
        self.parameters = dict(self.module.named_parameters())

    def weights(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Some matrices as they are now."""
        return {name: self.parameters[name].detach().float().cpu().clone() for name in names}

    def load(self, quantized: Mapping[str, QuantizedTensor], names: Sequence[str]) -> None:
        """Put rounded matrices in."""
        decoded = {name: torch.from_numpy(np.ascontiguousarray(quantized[name].dequantize())) for name in names}
        swap_weights(self.module, decoded)

    def skip(self, weights: Mapping[str, Tensor]) -> None:
        """Take over what one call of `tune` came to before."""
        swap_weights(self.module, weights)
        for _ in range(self.steps):
            next(self.batches)

    def tune(self, rates: Mapping[str, float], label: str) -> None:
        """Tune these matrices, each at its own rate. Raises NumericsError if the loss is not finite."""
        chosen = [self.parameters[name].requires_grad_(True) for name in rates]
        groups = [{"params": [parameter], "lr": rate} for parameter, rate in zip(chosen, rates.values(), strict=True)]
        optimizer = torch.optim.Adam(groups, betas=BETAS, eps=1e-12)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: 0.5 + 0.5 * math.cos(math.pi * step / self.steps)
        )
        with progress_bar(f"fine-tuning after block {label}", self.steps) as advance:
            for _ in range(self.steps):
                optimizer.zero_grad(set_to_none=True)
                kl = self._backward(torch.from_numpy(next(self.batches)))
                if not math.isfinite(kl):
                    raise NumericsError("predictions on calibration text are not finite with quantized weights")
                optimizer.step()
                schedule.step()
                advance(note=f"KL {kl:.5f}")
        for parameter in chosen:
            parameter.requires_grad_(False)
            parameter.grad = None

    def _backward(self, chosen: Tensor) -> float:
        """Gradients of the mean KL(teacher ‖ student) over some windows; that mean, nats per token."""
        total = 0.0
        for part in chosen.split(self.micro):
            tokens = self.tokens[part].to(self.device)
            with torch.no_grad():
                own = self.teacher.logits(self.teacher.hidden(tokens))
            with torch.enable_grad():
                other = self.module.logits(self.module.hidden(tokens))
                kl = token_divergences(own, other).mean() * (len(part) / len(chosen))
                kl.backward()
            total += kl.item()
        return total
