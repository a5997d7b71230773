"""The weights inside what people save around them: training dictionaries, wrappers of modules, averages.

A script saves `model.state_dict()`, or a dictionary with it and the optimizer, the step, a config, the state of random
numbers. `torch.compile`, data parallelism and `AveragedModel` put their own word before the names. Weights and averages
are found by the tables here; everything else is named, and ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from pgolf_post.checkpoint import ViewName
from pgolf_post.errors import MismatchError
from pgolf_post.importers.stand_ins import StandIn, number_of

MODEL_KEYS = ("model_state_dict", "state_dict", "model_state", "model", "module", "net", "weights", "params")
AVERAGE_KEYS: dict[ViewName, tuple[str, ...]] = {
    "ema": ("ema_state", "ema_state_dict", "ema_model_state_dict", "ema_model", "model_ema", "ema", "ema_params"),
    "swa": ("swa_state", "swa_state_dict", "swa_model_state_dict", "swa_model", "swa"),
}
INNER_KEYS = (*MODEL_KEYS, "shadow", "shadow_params", "ema_state", "ema")  # of a dictionary inside: {decay, shadow}
STEP_KEYS = ("step", "global_step", "iter_num", "iteration", "iter")
WRAPPERS = {  # parts of a name that a wrapper adds, wherever they stand
    "_orig_mod": "torch.compile",
    "module": "DistributedDataParallel, DataParallel or AveragedModel",
    "_fsdp_wrapped_module": "FullyShardedDataParallel",
    "_checkpoint_wrapped_module": "activation checkpointing",
    "_forward_module": "Lightning Fabric",
}
LEADING = ("model", "net", "gpt", "base_model")  # parts that an outer module adds, where all names begin with it
LARGEST_STEP = 10**9  # of any run; a larger number is something else, a time in nanoseconds say
COUNTERS = ("n_averaged",)  # tensors that AveragedModel keeps beside the weights
RESAVE = "save one of them alone: torch.save(state_dict, 'weights.pt')"


@dataclass(frozen=True)
class Wrapped:
    """The weights of a file by view, names without wrappers' parts, and what a reader should know about it."""

    views: Mapping[ViewName, Mapping[str, Tensor]]
    step: int | None
    notes: list[str]


class Found(NamedTuple):
    """A state dict, and where in the file it stood."""

    state: Mapping[str, Tensor]
    where: str
    ignored: list[str]


def unwrap(loaded: Mapping[str, Any], source: str) -> Wrapped:
    """Return the weights, averages and step in a loaded dictionary. Raises MismatchError if there are none, or two."""
    model = _model(loaded, source)
    averages = _averages(loaded, source) if model.where else {}
    found: dict[ViewName, Found] = {"raw": model, **averages}
    step, step_note = read_step(loaded) if model.where else (None, "")
    step_key = next((key for key in STEP_KEYS if key in loaded), None)
    read = {f.where.split(".")[0] for f in found.values()} | {step_key}
    notes = [*_read_and_ignored(loaded, found, read, "" if step is None else f", {step_key}"), step_note]
    views: dict[ViewName, Mapping[str, Tensor]] = {}
    for name, each in found.items():
        views[name], note = strip_wrappers(each.state, f"{source} ({name})")
        notes += [note]
    return Wrapped(views, step, list(dict.fromkeys(note for note in notes if note)))


def _read_and_ignored(
    loaded: Mapping[str, Any], found: Mapping[ViewName, Found], read: set[Any], step: str
) -> list[str]:
    """Return a note on the parts of a dictionary; nothing for a bare state dict."""
    ignored = [] if "" in read else [str(key) for key in loaded if key not in read]
    ignored += [key for each in found.values() for key in each.ignored]
    if "" in read and not ignored:
        return []
    taken = ", ".join(f"{each.where or 'its tensors'} ({name} weights)" for name, each in found.items())
    return [f"read: {taken}{step}; ignored: {', '.join(ignored) or 'nothing'}"]


# the weights


def _model(loaded: Mapping[str, Any], source: str) -> Found:
    if is_state(loaded):
        return Found(loaded, "", [])
    candidates = [found for key in MODEL_KEYS if (found := state_in(loaded.get(key), key))]
    if len(candidates) > 1:
        where = " and ".join(found.where for found in candidates)
        raise MismatchError(f"{source} holds several sets of weights: {where}", hint=RESAVE)
    if candidates:
        return candidates[0]
    tensors = {name: value for name, value in loaded.items() if isinstance(value, Tensor)}
    if any(name.endswith(".weight") for name in tensors if isinstance(name, str)):
        return Found(tensors, "", [str(name) for name in loaded if name not in tensors])
    raise MismatchError(
        f"{source}: neither a state dict nor a training checkpoint; its keys: {', '.join(map(str, loaded))}",
        hint=f"weights are looked for as a bare state dict or under {', '.join(MODEL_KEYS)}",
    )


def _averages(loaded: Mapping[str, Any], source: str) -> dict[ViewName, Found]:
    """Return the averages beside the weights, in float32. Raises MismatchError for one that is no state dict."""
    averages: dict[ViewName, Found] = {}
    for view, keys in AVERAGE_KEYS.items():
        present = [key for key in keys if not _is_nothing(loaded.get(key))]
        if len(present) > 1:
            raise MismatchError(f"{source} holds several averages: {' and '.join(present)}", hint=RESAVE)
        for key in present:
            found = state_in(loaded[key], key)
            if found is None:
                raise MismatchError(f"{source}: {key} weights are not a dictionary of tensors: {_outline(loaded[key])}")
            averages[view] = found
    return averages


def _is_nothing(value: object) -> bool:
    return value is None or value is False or (isinstance(value, Mapping | list | tuple) and not value)


def _outline(value: object) -> str:
    """Return a value in a few words, for a message."""
    if isinstance(value, Mapping):
        return "a dictionary of " + ", ".join(f"{key} ({type(item).__name__})" for key, item in list(value.items())[:8])
    if isinstance(value, StandIn):
        return f"an object of class {type(value).__name__}"
    size = f" of {len(value)}" if isinstance(value, list | tuple) else ""
    return f"a {type(value).__name__}{size}"


def state_in(value: object, where: str) -> Found | None:
    """Return the state dict that a value is, or holds under a usual name; None if it is none."""
    if is_state(value):
        return Found(value, where, [])  # type: ignore[arg-type]
    if not isinstance(value, Mapping):
        return None
    inner = [found for key in INNER_KEYS if (found := state_in(value.get(key), f"{where}.{key}"))]
    if len(inner) != 1:
        return None
    key = inner[0].where.removeprefix(f"{where}.").split(".")[0]
    return inner[0]._replace(ignored=[f"{where}.{other}" for other in value if other != key] + inner[0].ignored)


def is_state(value: object) -> bool:
    """Return whether a value is a dictionary of tensors by name, and not empty."""
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(name, str) and isinstance(item, Tensor) for name, item in value.items())
    )


# the step


def read_step(loaded: Mapping[str, Any]) -> tuple[int | None, str]:
    """Return the step in a training dictionary, if it is a number, and else a note on what stands there."""
    key = next((key for key in STEP_KEYS if key in loaded), None)
    if key is None:
        return None, ""
    step = whole_number(loaded[key])
    shown = "empty" if loaded[key] is None else repr(loaded[key])[:60]
    return step, "" if step is not None else f"{key} is {shown}, not a step's number: imported as step 0"


def whole_number(value: object) -> int | None:
    """Return a step's number, 0 … 10⁹, however it was saved: Python, NumPy, a tensor, digits; else None."""
    if isinstance(value, Tensor):
        is_number = value.numel() == 1 and not value.dtype.is_complex and not value.is_meta
        value = value.item() if is_number else None
    elif isinstance(value, StandIn):
        value = number_of(value)
    if isinstance(value, str):
        value = int(value) if value.strip().isdecimal() and len(value.strip()) <= 10 else None
    if isinstance(value, bool | None) or not isinstance(value, int | float | np.integer | np.floating):
        return None
    return int(value) if 0 <= value <= LARGEST_STEP and int(value) == value else None  # NaN is neither


# the names


def strip_wrappers(state: Mapping[str, Tensor], source: str) -> tuple[dict[str, Tensor], str]:
    """Return a state dict without the parts that wrappers add to names, and a note on those.

    Raises MismatchError if two names become one.
    """
    bare = {name: [part for part in name.split(".") if part not in WRAPPERS] for name in state}
    if any(len(parts) < name.count(".") + 1 for name, parts in bare.items()):
        bare = {name: parts for name, parts in bare.items() if name not in COUNTERS}
    stripped = {part for name in state for part in name.split(".") if part in WRAPPERS}
    while (first := _common_first(list(bare.values()))) is not None:
        bare = {name: parts[1:] for name, parts in bare.items()}
        stripped.add(first)
    renamed: dict[str, Tensor] = {}
    for name, parts in bare.items():
        if ".".join(parts) in renamed:
            raise MismatchError(
                f"{source} holds {'.'.join(parts)} twice, once as {name}: two sets of weights in one", hint=RESAVE
            )
        renamed[".".join(parts)] = state[name]
    dropped = [name for name in state if name not in bare]
    note = f"wrappers' parts taken off the names: {', '.join(f'{part}.' for part in sorted(stripped))}"
    return renamed, (note + (f"; ignored: {', '.join(dropped)}" if dropped else "")) if stripped else ""


def _common_first(names: list[list[str]]) -> str | None:
    """Return the first part of all names, if it is one that an outer module adds."""
    firsts = {parts[0] if len(parts) > 1 else "" for parts in names}
    return next(iter(firsts)) if len(firsts) == 1 and firsts <= set(LEADING) else None
