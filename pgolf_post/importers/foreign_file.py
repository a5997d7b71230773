"""Reading a foreign checkpoint file without running anything in it.

The first bytes say what a file is, not its name. `.pt` files are read with `weights_only=True`, which builds tensors
and plain containers and nothing else; `wrapped.py` finds the weights in them. A `.ptz` file is a compressed artifact
(`repack.py`), which gives the weights that it decodes to, rounded to the types that its script loads them in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pgolf_post.base.file_kinds import AGAIN, RESAVE, FileKind, file_kind, first_bytes
from pgolf_post.base.paths import absent
from pgolf_post.checkpoint import ViewName, read_tensors
from pgolf_post.errors import DamagedFileError, MismatchError, NotFoundError
from pgolf_post.importers.artifact_file import casts_of
from pgolf_post.importers.plain_weights import plain_weights
from pgolf_post.importers.repack import read_foreign_artifact
from pgolf_post.importers.stand_ins import HARMLESS, foreign_names, load_plainly
from pgolf_post.importers.wrapped import Wrapped, unwrap

ZLIB_HEADER = b"\x78"
NO_TENSORS = "cannot be read as tensors and plain containers"


@dataclass(frozen=True)
class ForeignFile:
    """The contents of a file, tensors in the foreign names."""

    views: Mapping[ViewName, Mapping[str, Tensor]]
    step: int | None
    notes: Sequence[str] = ()  # what was read, ignored, renamed or converted, for people


def read_foreign(path: Path) -> ForeignFile:
    """Read a .pt, .safetensors or .ptz file. Raises NotFoundError, DamagedFileError, MismatchError, NumericsError."""
    if not path.is_file():
        raise NotFoundError(absent(path))
    wrapped, notes = _wrapped(path)
    views: dict[ViewName, Mapping[str, Tensor]] = {}
    for name, state in wrapped.views.items():
        plain = plain_weights(state, f"{path} ({name})")
        views[name] = plain.state if name == "raw" else {key: tensor.float() for key, tensor in plain.state.items()}
        notes += plain.notes
    return ForeignFile(views, wrapped.step, list(dict.fromkeys([*wrapped.notes, *notes])))


def _wrapped(path: Path) -> tuple[Wrapped, list[str]]:
    """Read a file as what its first bytes say."""
    content = path.read_bytes()
    kind = file_kind(content)
    if content[:1] == ZLIB_HEADER or kind.name == "artifact" or (path.suffix == ".ptz" and kind.name not in PLAIN):
        tensors, notes = _dequantized(path)
        return unwrap(tensors, str(path)), notes
    if kind.name == "safetensors":
        return unwrap(_safetensors(path), str(path)), []
    if kind.name == "torch" and path.suffix == ".ptz":  # stored, not compressed: the dictionary of an artifact
        tensors, notes = _dequantized(path)
        return unwrap(tensors, str(path)), notes
    if kind.name != "torch":
        raise not_weights(path, kind, content)
    return unwrap(_load(content, path), str(path)), []


def _safetensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file of another program, of which no other checkpoint is here."""
    try:
        return read_tensors(path)
    except DamagedFileError as error:
        raise DamagedFileError(str(error), hint=AGAIN) from None


PLAIN = (
    "safetensors",
    "torch",
    "empty",
    "lfs",
    "html",
    "npz",
    "cut zip",
    "zip",
    "tar",
    "gguf",
    "hdf5",
    "npy",
    "pickle",
)


def not_weights(path: Path, kind: FileKind, content: bytes) -> DamagedFileError:
    """Return the error that says what a file is instead of weights."""
    begins = f" (it begins {first_bytes(content)})" if content else ""
    return DamagedFileError(f"{path} {NO_TENSORS}: it is {kind.words}{begins}", hint=kind.hint.format(path=path))


def _load(content: bytes, path: Path) -> Mapping[str, Any]:
    """Load a file of torch.save. Raises DamagedFileError naming the classes that it would need, MismatchError."""
    try:
        loaded = load_plainly(content)
    except Exception as error:  # a forged pickle breaks the reader in any way it likes
        needed = [name for name in foreign_names(content) if name.split(".")[0] not in HARMLESS]
        reason = f"it needs {', '.join(needed[:4])}, which would be run" if needed else _own_words(error)
        raise DamagedFileError(f"{path} {NO_TENSORS}: {reason}", hint=RESAVE) from None
    if not isinstance(loaded, Mapping):
        what = "single tensor" if isinstance(loaded, Tensor) else type(loaded).__name__
        raise MismatchError(f"{path} holds a {what}, expected a dictionary of tensors", hint=RESAVE)
    return loaded


def _own_words(error: Exception) -> str:
    """Return what is wrong with a file of torch.save; torch's advice to switch its check off is left out."""
    text = str(error)
    if "weights_only" in text or "Unsupported" in text or not text:
        return "it holds objects of other classes, or is damaged"
    return f"it is damaged: {text.splitlines()[0][:160]}"


def _dequantized(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Return a compressed artifact's float32 tensors, rounded to the types its script loads them in, and a note."""
    model = read_foreign_artifact(path).model
    tensors = {name: torch.from_numpy(array) for name, array in model.tensors().items()}
    casts = casts_of(model, path)
    tensors |= {name: tensors[name].to(dtype).float() for name, dtype in casts.items() if name in tensors}
    cast = ", ".join(f"{name} to {str(dtype).removeprefix('torch.')}" for name, dtype in casts.items())
    return tensors, [f"rounded as the script does when it loads the artifact: {cast}"] if cast else []
