"""Model families: how the toolkit reaches a model without knowing it.

A family turns a checkpoint's `model` and `graph` settings into a module, and says which matrices can be quantized and
where their inputs can be observed. Families register under the entry-point group `pgolf_post.models`, so that a user's
own model is a family like the one shipped in `trainer/`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pgolf_post.errors import MismatchError, NumericsError, SettingsError


@dataclass(frozen=True)
class Site:
    """A place in the forward pass whose input feeds one or more matrices; their Hessian is Σxxᵀ of that input."""

    name: str  # for example "blocks.3.attn.in"
    module: str  # dotted path of the submodule whose first input is observed
    tensors: tuple[str, ...]  # the matrices (out, in) that multiply this input
    outputs: tuple[str, ...] = ()  # submodules whose output is each matrix's product; default: those that own them
    is_head: bool = False  # the product is made in `logits`, not in `hidden`

    def output_of(self, tensor: str) -> str:
        """Dotted path of the submodule whose output is `tensor` times this input."""
        if self.outputs:
            return self.outputs[self.tensors.index(tensor)]
        return tensor.rpartition(".")[0]


@dataclass(frozen=True)
class Lookup:
    """A table whose rows are looked up by index in the forward pass."""

    tensor: str  # the table (rows, width)
    module: str  # dotted path of the submodule that maps indices to rows


@dataclass(frozen=True)
class Fold:
    """Where a matrix's input is another's output through an activation homogeneous of degree `power`."""

    producer: str  # scaling its row j by a > 0 scales input j by a^power
    power: float


class LanguageModel(Protocol):
    """What the toolkit asks of a family's module (an `nn.Module`)."""

    def hidden(self, tokens: Tensor) -> Tensor:
        """(batch, seq_len) int64 → (batch, seq_len, dim): the head's input."""

    def logits(self, hidden: Tensor) -> Tensor:
        """(…, dim) → (…, vocab_size) float32: what cross-entropy is taken of."""

    def start_past(self, batch: int, capacity: int) -> Any:
        """What makes generation cheap: pass it as `hidden(tokens, past=…)` and each call continues the last one's text.

        `capacity` is the most tokens it can hold.
        """


class ModelFamily(Protocol):
    """One architecture with its settings, sites and tensor roles."""

    name: str

    def build(self, model: Mapping[str, Any], graph: Mapping[str, Any]) -> nn.Module:
        """A module with uninitialised weights. Raises SettingsError for keys or values it does not know."""

    def complete(self, model: Mapping[str, Any]) -> dict[str, Any]:
        """The `model` settings with every default filled in. Raises SettingsError like `build`."""

    def sites(self, module: nn.Module) -> list[Site]:
        """Where each quantizable matrix's input can be observed."""

    def lookups(self, module: nn.Module) -> list[Lookup]:
        """The tables that are looked up by index, the token embedding first."""

    def role(self, tensor_name: str) -> str:
        """The tensor's role: q, k, v, attn_proj, mlp_fc, mlp_proj, embedding, head, projection or control."""

    def layer(self, tensor_name: str) -> int | None:
        """The index of the block that a tensor belongs to, or None."""

    def num_layers(self, module: nn.Module) -> int:
        """How many blocks the model has."""

    def looped_layers(self, module: nn.Module) -> frozenset[int]:
        """The blocks that the graph, in its present state, visits more than once."""

    def folds(self, module: nn.Module) -> dict[str, Fold]:
        """Matrices whose input scales with another matrix's rows, by name."""

    def train_seq_len(self, module: nn.Module) -> int:
        """The sequence length the model was trained on."""


@cache
def get_family(name: str) -> ModelFamily:
    """The family registered as `name`. Raises SettingsError naming the families that are installed."""
    registered = {entry.name: entry for entry in entry_points(group="pgolf_post.models")}
    if name not in registered:
        known = ", ".join(sorted(registered)) or "none: run `pip install -e .` so that entry points are registered"
        raise SettingsError(f"unknown model family {name!r}; installed families: {known}")
    family: ModelFamily = registered[name].load()()
    return family


def train_seq_len(config: Mapping[str, Any]) -> int:
    """The sequence length that a checkpoint's or an artifact's model was trained on, as its family knows it."""
    return get_family(config["family"]).train_seq_len(build_module(config))


def build_module(config: Mapping[str, Any]) -> nn.Module:
    """An uninitialised module on the meta device, from a checkpoint's config (family, model, graph)."""
    with torch.device("meta"):
        return get_family(config["family"]).build(config["model"], config["graph"])


def load_module(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    source: str,
    copy: bool = False,  # for one whose weights will change: else float32 tensors are shared
) -> nn.Module:
    """A float32 module in eval mode holding `tensors`. Strict: raises MismatchError listing every offender."""
    module = build_module(config)
    check_tensors(module, tensors, source)
    state = {name: tensor.to(torch.float32, copy=copy) for name, tensor in tensors.items()}
    module.load_state_dict(state, strict=True, assign=True)
    return module.eval().requires_grad_(False)


def check_tensors(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Raise MismatchError naming every missing, extra or mis-shaped tensor at once."""
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    problems = [f"missing {name} {shape}" for name, shape in expected.items() if name not in tensors]
    for name, tensor in tensors.items():
        if name not in expected:
            problems.append(f"unexpected {name} {tuple(tensor.shape)}")
        elif tuple(tensor.shape) != expected[name]:
            problems.append(f"{name} is {tuple(tensor.shape)}, config says {expected[name]}")
    if problems:
        raise MismatchError(f"{source}: tensors do not match the config: " + "; ".join(problems))


def check_finite(name: str, tensor: Tensor, source: str) -> None:
    """Raise NumericsError naming the tensor if it holds NaN or infinity."""
    bad = ~torch.isfinite(tensor)
    if bad.any():
        index = tuple(int(i) for i in bad.nonzero()[0])
        raise NumericsError(f"{source}: {name}{list(index)} is {tensor[index].item()} ({int(bad.sum())} such values)")


@torch.no_grad()
def swap_weights(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy weights into a module's own, in place: addresses stay, so compiled code stays valid."""
    state = module.state_dict()
    for name, tensor in tensors.items():
        state[name].copy_(tensor)
