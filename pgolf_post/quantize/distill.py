"""Distillation after rounding: tune the parameters that stay floats to make up for the rounded matrices.

Symbols and scales are frozen. What the plan keeps as floats (gains, mixes, gates, skip weights) is tuned by AdamW
with a cosine schedule to bring the quantized model's distribution back to that of the reference, the unquantized model.
The loss is the mean over tokens of KL(reference ‖ quantized), on calibration text, never on validation text. It costs
no bytes: values change, their number and type do not.

Part of the windows is held out. The tuned values are rounded as the artifact stores them, and kept only if on the
held-out windows both the KL and the nats of the text itself fall. Otherwise the model stays as it was, and the report
says so. The forward pass is the model's own; norms and gates of a quantized network are what BRECQ
(arXiv 2102.05426) and Norm Tweaking (arXiv 2309.02784) tune, layer by layer; here all of them see the final loss.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf_post.base.copying import to_device
from pgolf_post.base.divergence import divergences_of
from pgolf_post.base.progress import progress_bar, say
from pgolf_post.base.ranks import ALONE
from pgolf_post.calibrate.randomness import epochs, generator
from pgolf_post.calibrate.text import CalibrationSet
from pgolf_post.checkpoint import View
from pgolf_post.derived import derived_id
from pgolf_post.errors import MismatchError, NumericsError, SettingsError
from pgolf_post.families import build_module, load_module
from pgolf_post.plan import DistillSettings
from pgolf_post.quantize.tensor import QuantizedModel, widen

STAGE_VERSION = 1
BETAS = (0.9, 0.99)
LOWER_RATE = "pgolf-post requant --set distill.learning_rate=…, a lower one; or leave --distill out"
VERIFY = "pgolf-post checkpoint verify   (does the unquantized model score as it was saved?)"
READING_TOKENS = {"cpu": 0, "cuda": 32768}  # of a batch where nothing learns, if the settings' own are fewer


@dataclass(frozen=True)
class Losses:
    """Means per token over the held-out windows."""

    kl: float  # KL(reference ‖ quantized), nats
    nats: float  # of the text's own next tokens

    def require_finite(self, when: str, hint: str) -> Losses:
        """Return these losses. Raises NumericsError if they are not finite."""
        if not (math.isfinite(self.kl) and math.isfinite(self.nats)):
            raise NumericsError(f"the held-out loss {when} is not finite", hint=hint)
        return self


@dataclass(frozen=True)
class DistillReport:
    """Outcome of a distillation. Held-out losses are those of values as the artifact stores them."""

    kept: bool
    reason: str
    steps: int
    parameters: int
    train_tokens: int
    holdout_tokens: int
    before: Losses
    after: Losses
    seconds: float

    def facts(self) -> dict[str, Any]:
        """Return JSON facts."""
        losses = {
            f"{name}_{when}": getattr(losses, name)
            for when, losses in (("before", self.before), ("after", self.after))
            for name in ("kl", "nats")
        }
        names = ("kept", "reason", "steps", "parameters", "train_tokens", "holdout_tokens", "seconds")
        return {**{name: getattr(self, name) for name in names}, **losses}


def distill(
    model: QuantizedModel, view: View, text: CalibrationSet, settings: DistillSettings
) -> tuple[QuantizedModel, DistillReport]:
    """Return the model with its passed-through floats tuned, or the model as it was.

    Symbols and scale factors are the same objects. `text` is a calibration set, never validation text. The same inputs
    give the same values on a CPU; on a GPU sums add in another order. Raises SettingsError where the text has too few
    windows, MismatchError for a model of another view or one that keeps no parameter, NumericsError for values outside
    fp16's range.
    """
    started = time.perf_counter()
    if model.lineage.get("checkpoint_id") not in (None, view.id[:12]):
        raise MismatchError(f"the model was quantized from {model.lineage['checkpoint_id']}, the reference is {view}")
    windows = split_windows(text.tokens, settings)
    work = _Work(model, view, settings)
    with progress_bar("the reference's hidden states", sum(map(len, windows)), "windows") as advance:
        tune_text, held_out = (work.with_reference(part, advance) for part in windows)
    # Tune, round as stored, and compare on held-out text.
    first = work.losses(held_out).require_finite("before distillation", VERIFY)
    with progress_bar("distilling", settings.steps, "steps") as advance:
        work.tune(tune_text, advance)
    tuned = work.stored()
    work.load(tuned)
    last = work.losses(held_out).require_finite("after distillation", LOWER_RATE)
    kept = last.kl < first.kl and last.nats < first.nats
    worse = " and ".join(name for name in ("kl", "nats") if getattr(last, name) >= getattr(first, name))
    reason = "" if kept else f"held-out {worse} did not fall: the values are as they were"
    report = DistillReport(
        kept,
        reason,
        settings.steps,
        sum(array.size for array in tuned.values()),
        windows[0].size,
        windows[1].size,
        first,
        last,
        round(time.perf_counter() - started, 3),
    )
    _say(report)
    if not kept:
        return model, report
    lineage = {**model.lineage, "distill_id": distill_id(view, text, settings)[:12]}
    return replace(model, lineage=lineage, passthrough={**model.passthrough, **tuned}), report


def distill_id(view: View, text: CalibrationSet, settings: DistillSettings) -> str:
    """Return the id of a distillation, from reference, text and settings."""
    return derived_id("distill", STAGE_VERSION, [view.id, text.sha256], settings.model_dump(mode="json"))


def split_windows(tokens: np.ndarray, settings: DistillSettings) -> tuple[np.ndarray, np.ndarray]:
    """Split (windows, seq_len) int64 into windows for tuning and windows held out. Raises SettingsError below two."""
    windows = tokens[: max(1, settings.tokens // tokens.shape[1])]
    if len(windows) < 2 or tokens.shape[1] < 2:
        raise SettingsError(
            f"distillation needs a window to train on and one to hold out, of two tokens at least; it has "
            f"{len(windows)} of {tokens.shape[1]}",
            hint="--set distill.tokens=N, and as many --calibration-tokens",
        )
    order = generator(settings.seed, "held-out windows").permutation(len(windows))
    count = min(len(windows) - 1, max(1, round(settings.holdout * len(windows))))
    return windows[np.sort(order[count:])], windows[np.sort(order[:count])]


def tunable(model: QuantizedModel) -> list[str]:
    """Return the names of passed-through trainable parameters, in the model's order. Raises MismatchError if none."""
    module = build_module(model.config)
    names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    kept = [name for name in names if name in model.passthrough]
    if not kept:
        raise MismatchError("the plan keeps no trainable parameter as floats: distillation has nothing to tune")
    return kept


@dataclass(frozen=True)
class ReferenceText:
    """Windows of text with the reference's hidden states, so that only its head is run again."""

    tokens: Tensor  # (windows, seq_len) int64
    hidden: Tensor  # (windows, seq_len, dim), where the models are

    def __len__(self) -> int:
        return len(self.tokens)


class _Work:
    """The reference and the quantized model, built once."""

    def __init__(self, model: QuantizedModel, view: View, settings: DistillSettings) -> None:
        self.model, self.settings, self.device = model, settings, ALONE.device
        decoded = {name: torch.from_numpy(array) for name, array in model.tensors().items()}
        quantized = load_module(model.config, decoded, "quantized").to(self.device)
        self.quantized: Any = quantized  # LanguageModels
        self.reference: Any = load_module(view.config, view.tensors, str(view)).to(self.device)
        self.parameters = {name: quantized.get_parameter(name) for name in tunable(model)}

    @torch.no_grad()
    def with_reference(self, windows: np.ndarray, advance: Callable[..., None]) -> ReferenceText:
        """Run the reference once over (windows, seq_len) int64."""
        tokens, hidden = torch.from_numpy(windows), []
        for batch in tokens.split(self._batch_windows(windows.shape[1], READING_TOKENS[self.device.type])):
            hidden.append(self.reference.hidden(to_device(batch, self.device)))
            advance(len(batch))
        return ReferenceText(tokens, torch.cat(hidden))

    def _batch_windows(self, seq_len: int, at_least: int = 0) -> int:  # tokens
        return max(1, max(at_least, self.settings.batch_tokens) // seq_len)

    def tune(self, tune_text: ReferenceText, advance: Callable[..., None]) -> None:
        """Run the steps; parameters that the forward pass does not reach stay as they are."""
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        settings = self.settings
        optimizer = torch.optim.AdamW(
            list(self.parameters.values()), settings.learning_rate, BETAS, weight_decay=settings.weight_decay
        )
        size = min(len(tune_text), self._batch_windows(tune_text.tokens.size(1)))
        batches, before = epochs(len(tune_text), size, settings.seed, "distillation"), None
        with torch.enable_grad():
            for step in range(settings.steps):
                rate = 0.5 * settings.learning_rate * (1 + math.cos(math.pi * step / settings.steps))
                optimizer.param_groups[0]["lr"] = rate
                kl, _ = self._loss(tune_text, torch.from_numpy(next(batches)))
                optimizer.zero_grad(set_to_none=True)
                kl.backward()
                optimizer.step()
                advance(note="" if before is None else f"KL {before.item():.5f}")
                before = kl.detach()  # read when the next step is queued: a GPU does not wait
        for parameter in self.parameters.values():
            parameter.requires_grad_(False)

    def _loss(self, text: ReferenceText, chosen: Tensor) -> tuple[Tensor, Tensor]:  # chosen: (batch,) int64
        """Return the mean KL over all positions, and the mean nats of the next tokens."""
        tokens, windows = to_device(text.tokens[chosen], self.device), to_device(chosen, self.device)
        with torch.no_grad():
            target = F.log_softmax(self.reference.logits(text.hidden[windows]).float(), -1)
        log_probs = F.log_softmax(self.quantized.logits(self.quantized.hidden(tokens)).float(), -1)
        kl = divergences_of(target, log_probs).mean()
        nats = F.nll_loss(log_probs[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        return kl, nats

    @torch.no_grad()
    def losses(self, held_out: ReferenceText) -> Losses:
        """Return the quantized model's losses, summed in float64."""
        sums = np.zeros(2)
        size = self._batch_windows(held_out.tokens.size(1), READING_TOKENS[self.device.type])
        for batch in torch.arange(len(held_out)).split(size):
            sums += [float(loss) * len(batch) for loss in self._loss(held_out, batch)]
        return Losses(*(sums / len(held_out)).tolist())

    def stored(self) -> dict[str, np.ndarray]:
        """Return the tuned values in the types that the model stores."""
        return {
            name: to_stored(name, parameter.detach().cpu(), self.model.passthrough[name])
            for name, parameter in self.parameters.items()
        }

    @torch.no_grad()
    def load(self, values: Mapping[str, np.ndarray]) -> None:
        """Put stored values into the quantized model."""
        for name, array in values.items():
            self.parameters[name].copy_(torch.from_numpy(widen(array)))


def to_stored(name: str, values: Tensor, like: np.ndarray) -> np.ndarray:
    """Return values as `like` is stored: float16, or bfloat16's bits.

    Raises NumericsError for NaN, infinity and overflow.
    """
    kind = torch.bfloat16 if like.dtype == np.uint16 else torch.float16
    rounded = values.to(kind)
    if not torch.isfinite(rounded).all():
        largest = float(values.abs().max())
        raise NumericsError(
            f"{name}: tuning brought it to {largest:.4g}, which {str(kind).removeprefix('torch.')} cannot hold",
            hint=LOWER_RATE,
        )
    array: np.ndarray = (rounded.view(torch.uint16) if kind is torch.bfloat16 else rounded).contiguous().numpy()
    return array


def _say(report: DistillReport) -> None:
    verdict = "kept" if report.kept else f"NOT kept: {report.reason}"
    say(
        f"distilled {report.parameters:,} floats in {report.steps} steps: held-out KL {report.before.kl:.6f} → "
        f"{report.after.kl:.6f}, nats per token {report.before.nats:.5f} → {report.after.nats:.5f}; {verdict}"
    )
