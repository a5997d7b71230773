"""Model families: how the toolkit reaches a model without knowing it.

A family turns a checkpoint's `model` and `graph` settings into a module, and says which matrices can be quantized and
where their inputs can be observed. Families register under the entry-point group `pgolf_post.models`, so that a user's
own model is a family like the one shipped in `trainer/`.
"""

from __future__ import annotations

import importlib.util
import re
import traceback
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pgolf_post.base.paths import absent
from pgolf_post.errors import MismatchError, NotFoundError, NumericsError, SettingsError
from pgolf_post.watching import Watcher


@dataclass(frozen=True)
class Site:
    """A place in the forward pass whose input feeds one or more matrices; their Hessian is Σxxᵀ of that input."""

    name: str  # for example "blocks.3.attn.in"
    module: str  # dotted path of the submodule whose first input is observed; of the head it is what `hidden` returns
    tensors: tuple[str, ...]  # the matrices (out, in) that multiply this input
    outputs: tuple[str, ...] = ()  # submodules whose output is each matrix's product; default: those that own them
    is_head: bool = False  # the product is made in `logits`, not in `hidden`

    def output_of(self, tensor: str) -> str:
        """Return the dotted path of the submodule whose output is `tensor` times this input."""
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
    """Pair of matrices: the input of one is the other's output through an activation homogeneous of degree `power`."""

    producer: str  # scaling its row j by a > 0 scales input j by a^power
    power: float


class LanguageModel(Protocol):
    """The interface of a family's module (an `nn.Module`)."""

    def parameters(self) -> Iterator[Tensor]:
        """Yield the weights, which all lie on one device."""

    def hidden(self, tokens: Tensor) -> Tensor:
        """Return the head's input: (batch, seq_len) int64 → (batch, seq_len, dim)."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits that cross-entropy is taken of: (…, dim) → (…, vocab_size) float32."""

    def start_past(self, batch: int, capacity: int) -> Any:
        """Return an empty cache of at most `capacity` tokens, which makes generation cheap.

        Passed as `hidden(tokens, past=…)`, it lets each call continue the text of the last one.
        """


class ModelFamily(Protocol):
    """One architecture with its settings, sites and tensor roles."""

    name: str

    def build(self, model: Mapping[str, Any], graph: Mapping[str, Any]) -> nn.Module:
        """Return a module with uninitialised weights. Raises SettingsError for keys or values it does not know."""

    def complete(self, model: Mapping[str, Any]) -> dict[str, Any]:
        """Return the `model` settings with every default filled in. Raises SettingsError like `build`."""

    def sites(self, module: nn.Module) -> list[Site]:
        """Return the places where each quantizable matrix's input can be observed."""

    def lookups(self, module: nn.Module) -> list[Lookup]:
        """Return the tables that are looked up by index, the token embedding first."""

    def role(self, tensor_name: str) -> str:
        """Return the tensor's role: q, k, v, attn_proj, mlp_fc, mlp_proj, embedding, head, projection or control."""

    def layer(self, tensor_name: str) -> int | None:
        """Return the index of the block that a tensor belongs to, or None."""

    def num_layers(self, module: nn.Module) -> int:
        """Return how many blocks the model has."""

    def looped_layers(self, module: nn.Module) -> frozenset[int]:
        """Return the blocks that the graph, in its present state, visits more than once."""

    def folds(self, module: nn.Module) -> dict[str, Fold]:
        """Return the matrices whose input scales with another matrix's rows, by name."""

    def train_seq_len(self, module: nn.Module) -> int:
        """Return the sequence length the model was trained on."""

    def branches(self, module: nn.Module) -> dict[int, tuple[str, ...]]:
        """Return block → dotted paths of the submodules whose outputs it adds to the residual."""

    def watch(self, module: nn.Module, watcher: Watcher) -> AbstractContextManager[None]:
        """Return a context in which forward passes report to a watcher what the family can show."""

    def logit_cap(self, module: nn.Module) -> float | None:
        """Return the largest absolute logit that the model can give, or None."""


class BaseFamily:
    """Defaults that most families share: settings, layers counted by their tensors, no loops, no folds.

    A family of your own subclasses it, sets `name` and `settings`, and writes build, sites, lookups, role and layer.
    """

    name: str
    settings: Mapping[str, Any] = MappingProxyType({})  # every key of `model` → its default; None: must be given

    def complete(self, model: Mapping[str, Any]) -> dict[str, Any]:
        """Return `model` with every default filled in. Raises SettingsError naming unknown and missing keys."""
        whole = {**self.settings, **model}
        unknown = [key for key in model if key not in self.settings]
        missing = [key for key, value in whole.items() if value is None]
        problems = [f"{what} {', '.join(keys)}" for what, keys in (("unknown", unknown), ("missing", missing)) if keys]
        if problems:
            valid = ", ".join(self.settings)
            raise SettingsError(f"model settings of {self.name!r}: {'; '.join(problems)}; valid keys: {valid}")
        return whole

    def layer(self, tensor_name: str) -> int | None:
        """Return N of `blocks.N.…`, or None."""
        match = re.match(r"blocks\.(\d+)\.", tensor_name)
        return int(match.group(1)) if match else None

    def num_layers(self, module: nn.Module) -> int:
        """Return how many layers the module's tensors name."""
        return 1 + max((self.layer(name) or 0 for name in module.state_dict()), default=0)

    def looped_layers(self, module: nn.Module) -> frozenset[int]:
        """Return no layer: each block runs once."""
        return frozenset()

    def folds(self, module: nn.Module) -> dict[str, Fold]:
        """Return no fold: AWQ's 1/s is stored beside a matrix, which is exact for any model."""
        return {}

    def train_seq_len(self, module: nn.Module) -> int:
        """Return the module's own `seq_len`."""
        return int(module.seq_len)  # type: ignore[arg-type]

    def branches(self, module: nn.Module) -> dict[int, tuple[str, ...]]:
        """Return no block: `diagnose` then measures no removal."""
        return {}

    def watch(self, module: nn.Module, watcher: Watcher) -> AbstractContextManager[None]:
        """Return a context in which nothing is reported: `diagnose` then has the inputs of sites alone."""
        return nullcontext()

    def logit_cap(self, module: nn.Module) -> float | None:
        """Return no cap."""
        return None


_from_files: dict[str, ModelFamily] = {}  # families that --family named in this process
_sources: dict[str, str] = {}  # and what named them, "/…/FILE.py:CLASS"


def load_family(source: str) -> ModelFamily:  # "FILE.py:CLASS"
    """Run a Python file of the user's and register its family for this process.

        >>> pg.load_family("examples/my_family.py:TinyGPTFamily").name

    Raises NotFoundError for a missing file, SettingsError where the file fails, where it does not define the class, or
    where the class is no family or has the name of an installed one.
    """
    path_text, colon, class_name = source.rpartition(":")
    path = Path(path_text)
    if not colon or path.suffix != ".py":
        raise SettingsError(f"--family {source!r}: expected FILE.py:CLASS, for example my_family.py:TinyGPTFamily")
    if not path.is_file():
        raise NotFoundError(f"--family {source!r}: {absent(path)}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        raise SettingsError(
            f"--family {source!r}: {type(error).__name__}: {error} ({at.filename}, line {at.lineno})"
        ) from error
    defined = getattr(module, class_name, None)
    if not isinstance(defined, type):
        classes = [name for name, value in vars(module).items() if isinstance(value, type) and hasattr(value, "sites")]
        raise SettingsError(f"{path} defines no class {class_name!r}; its families: {', '.join(classes) or 'none'}")
    _require_family(defined, source)
    family: ModelFamily = defined()
    _from_files[family.name] = family
    _sources[family.name] = f"{path.resolve()}:{class_name}"
    get_family.cache_clear()
    return family


def _require_family(defined: Any, source: str) -> None:
    """Raise SettingsError listing what a family must have and a class lacks, or for a name that is taken."""
    members = [name for name in vars(ModelFamily) if not name.startswith("_")]
    lacking = [name for name in ("name", *members) if not hasattr(defined, name)]
    if lacking:
        raise SettingsError(f"--family {source!r}: {defined.__name__} has no {', '.join(lacking)}; see BaseFamily")
    taken = {entry.name for entry in entry_points(group="pgolf_post.models")}
    if defined.name in taken:
        raise SettingsError(f"--family {source!r}: {defined.name!r} is an installed family; give it another name")


def family_sources() -> tuple[str, ...]:
    """Return what to give `load_family` in another process, so that it has this one's families."""
    return tuple(_sources.values())


def forget_families() -> None:
    """Forget the families that load_family registered."""
    _from_files.clear()
    _sources.clear()
    get_family.cache_clear()


@cache
def get_family(name: str) -> ModelFamily:
    """Return the family of that name, from --family or an entry point. Raises SettingsError naming those there are."""
    if name in _from_files:
        return _from_files[name]
    registered = {entry.name: entry for entry in entry_points(group="pgolf_post.models")}
    if name not in registered:
        known = ", ".join(sorted(registered)) or "none: run `pip install -e .` so that entry points are registered"
        raise SettingsError(
            f"unknown model family {name!r}; installed families: {known}",
            hint="pgolf-post --family FILE.py:CLASS …, or an entry point in the group pgolf_post.models",
        )
    family: ModelFamily = registered[name].load()()
    return family


def train_seq_len(config: Mapping[str, Any]) -> int:
    """Return the sequence length that a checkpoint's or an artifact's model was trained on, as its family knows it."""
    return get_family(config["family"]).train_seq_len(build_module(config))


def build_module(config: Mapping[str, Any]) -> nn.Module:
    """Return an uninitialised module on the meta device, from a checkpoint's config (family, model, graph)."""
    try:
        with on_no_device():
            return get_family(config["family"]).build(config["model"], config["graph"])
    except RuntimeError as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # it left torch's stack of modes uneven, hence the error
            raise KeyboardInterrupt from error
        raise


DRAWING = (  # of tensors, and of torch.nn.init
    *("normal_", "uniform_", "trunc_normal_", "kaiming_normal_", "kaiming_uniform_", "xavier_normal_"),
    *("xavier_uniform_", "orthogonal_"),
)


class _Undrawn(TorchFunctionMode):
    """Leaves tensors without values as they are where numbers would be drawn: torch loads its compiler for that."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in DRAWING:
            tensor = args[0] if args else kwargs["tensor"]
            if tensor.is_meta:
                return tensor
        return func(*args, **kwargs)


@contextmanager
def on_no_device() -> Iterator[None]:
    """Make tensors in this block without values, on the meta device."""
    with torch.device("meta"), _Undrawn():
        yield


def load_module(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    source: str,
    copy: bool = False,  # for one whose weights will change: else float32 tensors are shared
) -> nn.Module:
    """Return a float32 module in eval mode holding `tensors`. Raises MismatchError listing every offender."""
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
