"""Training that expects `fit`: steps see the weights with the noise it will leave, and bits have their price.

Rounding by `fit` at c leaves errors of covariance η·c²/12κ · C⁻¹ ⊗ M⁻¹: each direction gets as much as it can bear at
equal cost. With mode "fit" a step's weights are W + E and W - E, in one half of its micro-batches each, with

    E = c·√(η/12) · C^(-1/2) · Z · M^(-1/2),   Z normal

drawn for every step; what is linear in E cancels between the halves, and half the curvature's loss stays (with κ, which
is not known in training, taken as 1). A step with an odd number of micro-batches shares its noise with the next, signs
turned. No row gets more noise than its own mean square: rounding it to zeros would cost no more.

C and M run along with the gradients (`running_curvature.py`), refreshed every few steps; c follows from the bits a
weight that the artifact will have (`rate.py`). With `qat.rate`, λ times those bits joins the loss, in either mode. Its
gradient is added once a step, outside the compiled graph, at the weights without noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pgolf_post.errors import SettingsError
from trainer.model.gpt import GolfGPT
from trainer.optim.optimizer import assign_groups
from trainer.step.distributed import SINGLE_PROCESS, TrainingRanks
from trainer.step.qat_settings import QatSettings
from trainer.step.rate import TRELLIS, bits_gradient, bits_of, constant_at, front_slope
from trainer.step.running_curvature import RunningCurvature, Whitening, num_numbers

Batches = Iterable[tuple[Tensor, Tensor]]

GATHER = 0.1  # progress before `at` from which moments are gathered
LEAST_REFRESHES = 16  # before a matrix's moments are believed


class FitExpectation:
    """The moments, the noise and the price of bits of one run."""

    def __init__(self, model: GolfGPT, settings: QatSettings, seed: int, ranks: TrainingRanks = SINGLE_PROCESS) -> None:
        """Find the model's matrices; nothing is drawn or gathered yet."""
        self.matrices, tables = matrices_of(model)
        self.settings, self.seed, self.ranks = settings, seed, ranks
        self.curvature = RunningCurvature(self.matrices, tables)
        self.whitening: dict[str, Whitening] = {}  # of the matrices that act
        self.constant: Tensor | None = None  # () c
        self.facts: dict[str, Any] = settings.model_dump(mode="json", exclude_none=True)
        self._kept: dict[str, Tensor] | None = None  # weights without noise, inside `during`

    # ---- before and during the backward passes -----------------------------------------------------------------

    @contextmanager
    def during(self, step: int, at: float) -> Iterator[None]:
        """Let `batches` exchange the weights inside the block; afterwards they are as before."""
        if self.settings.mode != "fit" or not self.acts(at):
            yield
            return
        with torch.no_grad():
            self._kept = {name: self.matrices[name].detach().clone() for name in self.whitening}
        try:
            yield
        finally:
            with torch.no_grad():
                for name, tensor in self._kept.items():
                    self.matrices[name].copy_(tensor)
            self._kept = None

    def batches(
        self,
        batches: Batches,  # this rank's micro-batches of the step
        step: int,
        num_batches: int,  # of the step, on all ranks
        weights_changed: Callable[[], None] | None = None,  # called after each exchange
    ) -> Batches:
        """Yield the micro-batches, the weights exchanged for W + E or W - E before each."""
        kept = self._kept
        if kept is None:
            yield from batches
            return
        odd = num_batches % 2
        noise = self.noise(kept, step // 2 if odd else step)
        for number, batch in enumerate(batches):
            place = self.ranks.rank + number * self.ranks.world_size  # among all ranks' micro-batches
            sign = -1 if (place + odd * step) % 2 else 1
            with torch.no_grad():
                for name, error in noise.items():
                    torch.add(kept[name], error, alpha=sign, out=self.matrices[name].data)
            if weights_changed:
                weights_changed()
            yield batch

    @torch.no_grad()
    def noise(self, weights: Mapping[str, Tensor], draw: int) -> dict[str, Tensor]:
        """Return E of every matrix that acts, drawn by seed and number: the same on every rank."""
        assert self.constant is not None
        seeds = np.random.SeedSequence([self.seed, draw, 23]).generate_state(1, np.uint64)
        size = self.constant * math.sqrt(TRELLIS / 12)
        device = next(iter(weights.values())).device
        generator, found = torch.Generator(device).manual_seed(int(seeds[0] >> 1)), {}
        for name, white in self.whitening.items():
            weight = weights[name]
            normal = torch.randn(weight.shape, generator=generator, device=device, dtype=weight.dtype)
            error = size * white.unwhiten(normal)
            most = (
                (weight.square().sum(1) / error.square().sum(1)).sqrt().clamp(max=1)
            )  # 1 where a row is not all noise
            found[name] = error * most[:, None]
        return found

    # ---- after them --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def after_backward(self, step: int, at: float, tokens: int) -> Tensor | None:  # () float64, or nothing
        """Refresh the moments where that is due, then add this rank's share of the rate's gradient.

        Return its share of the rate in nats a token, where it acts.
        """
        if at >= self.settings.at - GATHER and step % self.settings.every == 0:
            self._refresh(tokens)
        if not self.settings.rate or not self.acts(at):
            return None
        slope, share = self.slope(), 1 / self.ranks.world_size
        total = torch.zeros((), dtype=torch.float64, device=slope.device)
        for name in self.whitening:
            weight = self.matrices[name]
            if weight.grad is not None:
                steps = self.steps(name)
                weight.grad.add_(share * slope * bits_gradient(weight, steps))
                total += bits_of(weight, steps)
        return share * slope * total

    def _refresh(self, tokens: int) -> None:
        """Take up the gradients of this step, and find c and the factors anew."""
        found = {name: weight.grad for name, weight in self.matrices.items() if weight.grad is not None}
        if self.ranks.world_size > 1:
            found = {name: gradient.clone() for name, gradient in found.items()}
            self.ranks.sum_each_(list(found.values()))
        self.curvature.update(found, tokens)
        self._whiten()
        if self.whitening:
            unit = [self.matrices[name].square().mean(1) / self._unit_steps(name).square() for name in self.whitening]
            weights = [
                torch.full_like(rows, self.matrices[name].shape[1])
                for name, rows in zip(self.whitening, unit, strict=True)
            ]
            assert self.settings.bits is not None
            self.constant = constant_at(torch.cat(unit), torch.cat(weights), self.settings.bits)

    def _whiten(self) -> None:
        self.whitening = {name: self.curvature.whitening(name) for name in self.curvature.known(LEAST_REFRESHES)}

    def _unit_steps(self, name: str) -> Tensor:  # (out,)
        white = self.whitening[name]
        return (white.row_pivots * white.column_pivot).rsqrt()

    def steps(self, name: str) -> Tensor:  # (out,)
        """Return Δ_row of a matrix."""
        assert self.constant is not None
        return self.constant * self._unit_steps(name)

    def slope(self) -> Tensor:  # ()
        """Return λ, nats a token for each bit: the recipe's number, or the slope of the front at these steps."""
        assert self.constant is not None
        rate = self.settings.rate
        return front_slope(self.constant) if rate == "front" else torch.full_like(self.constant, rate)

    # ---- what is kept and said ---------------------------------------------------------------------------------

    def acts(self, at: float) -> bool:
        """Return whether a step from this progress is another than without it."""
        return at >= self.settings.at and bool(self.whitening)

    def now(self) -> dict[str, Any]:
        """Return for meta.json how many matrices act, by which c, and the slope of the front there."""
        if self.constant is None:
            return {"matrices": 0}
        slope = float(front_slope(self.constant))
        return {"matrices": len(self.whitening), "constant": float(self.constant), "front_nats_per_bit": slope}

    def state(self) -> dict[str, Tensor]:
        """Return the moments, and c where there is one, as named tensors of training.safetensors."""
        constant = {} if self.constant is None else {"curvature.constant": self.constant}
        return {**self.curvature.state(), **constant}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take what `state` returned; a checkpoint of a run without it leaves everything to be gathered."""
        if not any(name.startswith("curvature.") for name in state):
            return
        self.curvature.load_state(state)
        if "curvature.constant" in state:
            self.constant = state["curvature.constant"].to(next(iter(self.matrices.values())).device, copy=True)
            self._whiten()

    def in_words(self) -> str:
        """Return in one line what the steps see."""
        settings = self.settings
        parts = [f"{len(self.matrices)} matrices have the noise of fit"] if settings.mode == "fit" else []
        if settings.rate:
            price = "the slope of the front" if settings.rate == "front" else f"{settings.rate:g} nats a token"
            parts.append(f"each bit costs {price}")
        return f"from progress {settings.at:g} on {' and '.join(parts)}, at {settings.bits:g} bits a weight"


def matrices_of(model: GolfGPT) -> tuple[dict[str, Tensor], frozenset[str]]:
    """Return the matrices that are rounded, (out, in) each, and which of them are tables or heads."""
    groups = assign_groups(model)
    tables = frozenset([*groups.get("embed", ()), *groups.get("head", ())])
    named = {*groups.get("matrix", ()), *tables}
    return {name: tensor for name, tensor in model.named_parameters() if name in named}, tables


def num_curvature(model: GolfGPT) -> int:
    """Return how many numbers the moments of a model and their factors are."""
    matrices, tables = matrices_of(model)
    return sum(num_numbers(len(matrix), matrix.shape[1], name in tables) for name, matrix in matrices.items())


def require_whole_gradients(adapts: bool) -> None:
    """Raise SettingsError where some steps' gradients are not those of all their tokens."""
    if adapts:
        raise SettingsError(
            "qat.bits: steps of meta_ttt take the gradients of half their tokens, which the moments would count as all",
            hint="leave out [meta_ttt], or take qat.mode round or noise",
        )
