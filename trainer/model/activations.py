"""The MLP's activations: one function and one row of ACTIVATIONS each.

A plain activation makes the MLP proj(f(fc x)). A gated one (Shazeer 2020) makes it proj(f(gate x) · fc x), with a
second input matrix. A row also says what others ask of an activation: how its output scales with a row of fc, which
the toolkit needs to move scales from one matrix to the other, and whether the fused Triton kernel has it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch.nn.functional as F
from torch import Tensor

from trainer.tables import name_in, pick, read_keys


def relu2(x: Tensor) -> Tensor:
    """max(x, 0)²."""
    return F.relu(x).square()


def relu3(x: Tensor) -> Tensor:
    """max(x, 0)³."""
    return F.relu(x).pow(3)


def leaky_relu2(x: Tensor, leaky_slope: float) -> Tensor:
    """(x above 0, leaky_slope · x below)²: unlike relu², never without a gradient."""
    return F.leaky_relu(x, leaky_slope).square()


def silu2(x: Tensor) -> Tensor:
    """(x · sigmoid(x))²."""
    return F.silu(x).square()


def gelu2(x: Tensor) -> Tensor:
    """(x · Φ(x))², Φ the normal distribution's cumulative function."""
    return F.gelu(x).square()


@dataclass(frozen=True)
class Activation:
    """A row of ACTIVATIONS."""

    function: Callable[..., Tensor]  # elementwise, of x and the settings that it reads
    source: str  # paper or pull request
    reads: tuple[str, ...] = ()  # keys of the architecture settings, passed to the functions by name
    gated: bool = False
    power: float | None = None  # fc's row times a > 0 is the output times a^power; None where no power holds
    kernel_slope: Callable[..., float] | None = None  # slope below 0 of the fused (leaky-)relu² MLP; None = not fused

    def bind(self, settings: object) -> Callable[[Tensor], Tensor]:
        """Return the function of x alone, under the given architecture settings."""
        return partial(self.function, **read_keys(settings, self.reads))


ACTIVATIONS: dict[str, Activation] = {
    "relu2": Activation(
        relu2, power=2.0, kernel_slope=lambda: 0.0, source="So et al. 2021 (Primer), arXiv:2109.08668; the baseline"
    ),
    "leaky_relu2": Activation(
        leaky_relu2,
        reads=("leaky_slope",),
        power=2.0,
        kernel_slope=lambda leaky_slope: leaky_slope,
        source="openai/parameter-golf #549 and the record line after it",
    ),
    "relu3": Activation(relu3, power=3.0, source="openai/parameter-golf: forks of the record line"),
    "silu2": Activation(silu2, source="the square of SiLU, Elfwing et al. 2018, arXiv:1702.03118"),
    "gelu2": Activation(gelu2, source="the square of GELU, Hendrycks & Gimpel 2016, arXiv:1606.08415"),
    "swiglu": Activation(F.silu, gated=True, power=1.0, source="Shazeer 2020, arXiv:2002.05202"),
}

ActivationNames = Annotated[str | tuple[str, ...], name_in(ACTIVATIONS, "activation")]  # one, or one per layer


def activation_of(name: str) -> Activation:
    """Return the row of an activation. Raises SettingsError listing the names that there are."""
    return pick(ACTIVATIONS, name, "activation")
