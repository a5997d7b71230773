"""Reading a foreign checkpoint file without running anything in it.

`.pt` files are read with `weights_only=True`, which builds tensors and plain containers and nothing else. A file is a
bare state dict, or a dictionary that holds one as `model_state_dict` and possibly an EMA as `ema_state`; a `.ptz` file
is a compressed artifact (`repack.py`), which gives the weights that it decodes to.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pgolf_post.checkpoint import ViewName, read_tensors
from pgolf_post.errors import DamagedFileError, MismatchError, NotFoundError
from pgolf_post.importers.repack import read_foreign_artifact

ZLIB_HEADER = b"\x78"
KNOWN_KEYS = {"step", "model_state_dict", "ema_state", "optimizer_states"}


@dataclass(frozen=True)
class ForeignFile:
    """The contents of a file, tensors in the foreign names."""

    views: Mapping[ViewName, Mapping[str, Tensor]]
    step: int | None


def read_foreign(path: Path) -> ForeignFile:
    """Read a .pt, .safetensors or .ptz file. Raises NotFoundError, DamagedFileError, MismatchError."""
    if not path.is_file():
        raise NotFoundError(f"no such file: {path}")
    if path.suffix == ".safetensors":
        return ForeignFile({"raw": read_tensors(path)}, None)
    content = path.read_bytes()
    if path.suffix == ".ptz" or content[:1] == ZLIB_HEADER:
        return ForeignFile({"raw": _dequantized(path)}, None)
    loaded = _load(content, path)
    if _is_state(loaded):
        return ForeignFile({"raw": loaded}, None)
    return _training_dictionary(loaded, path)


def _training_dictionary(loaded: Mapping[str, Any], path: Path) -> ForeignFile:
    """Read the {step, model_state_dict, optimizer_states, ema_state} form; optimizer moments are left out."""
    unknown = sorted(set(loaded) - KNOWN_KEYS)
    if "model_state_dict" not in loaded or unknown:
        raise MismatchError(
            f"{path}: neither a state dict nor a training checkpoint; its keys: {', '.join(map(str, loaded))}"
        )
    views: dict[ViewName, Mapping[str, Tensor]] = {"raw": loaded["model_state_dict"]}
    if loaded.get("ema_state"):
        views["ema"] = {name: tensor.float() for name, tensor in loaded["ema_state"].items()}
    bad = [name for name, state in views.items() if not _is_state(state)]
    if bad:
        raise MismatchError(f"{path}: {', '.join(bad)} weights are not a dictionary of tensors")
    return ForeignFile(views, int(loaded["step"]) if "step" in loaded else None)


def _is_state(value: object) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(item, Tensor) for item in value.values())


def _load(content: bytes, path: Path) -> Any:
    try:
        loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DamagedFileError(f"{path} cannot be read as tensors and plain containers: {reason}") from None
    if not isinstance(loaded, Mapping):
        raise MismatchError(f"{path} holds a {type(loaded).__name__}, expected a dictionary of tensors")
    return loaded


def _dequantized(path: Path) -> dict[str, Tensor]:
    """Return the float32 tensors that a compressed artifact decodes to."""
    model = read_foreign_artifact(path).model
    return {name: torch.from_numpy(array) for name, array in model.tensors().items()}
