"""Weight averaging after training: linear blends of checkpoints, as new checkpoints.

SWA averages raw weights along the warm-down (members.py says which), the EMA is the trainer's own running average, and
`ema_share` interpolates between the two: 0 is pure SWA, 1 the EMA itself; with the last raw checkpoint as the only
member it interpolates raw and EMA. Any other checkpoints can be blended by name.

Parts are read one tensor at a time from their files, each file's id verified on the way, and summed in float64 to
float32: whatever the number of parts, one model is held. Checkpoints whose configs differ, runtime graph state
included, are not blended unless each differing key is allowed by name; the result then has the last part's value.
"""

from __future__ import annotations

import difflib
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pgolf_post.average.members import member_shares, select_members
from pgolf_post.average.settings import Selection, SwaSettings
from pgolf_post.base.paths import absent
from pgolf_post.base.progress import progress_bar, say
from pgolf_post.base.storage import update_digest
from pgolf_post.checkpoint import (
    VIEW_FILES,
    Checkpoint,
    ViewName,
    config_differences,
    flat_config,
    save_checkpoint,
    view_id,
    view_id_of,
)
from pgolf_post.data import DataFolder
from pgolf_post.errors import DamagedFileError, MismatchError, NotFoundError, SettingsError
from pgolf_post.families import build_module, check_finite, check_tensors
from pgolf_post.score.metric import measure

INHERITED = ("run", "step", "tokens_seen", "train_seconds", "data_dir", "recipe")
DEFAULT_SELECTION = Selection()


@dataclass(frozen=True)
class Part:
    """One ingredient of a blend; its tensors stay on disk."""

    checkpoint: Checkpoint
    view: ViewName
    share: float

    @property
    def path(self) -> Path:
        return self.checkpoint.path / VIEW_FILES[self.view]

    def facts(self) -> dict[str, Any]:
        """Return the part's entry in a blend's meta.json."""
        folder = self.checkpoint.path
        place = {"run": folder.parent.name, "folder": folder.name, "view": self.view}
        return {"id": self.checkpoint.view_id(self.view), **place, "share": self.share}


@dataclass(frozen=True)
class Blend:
    """Blended tensors and their parts. The last part gives the config."""

    tensors: Mapping[str, Tensor]
    parts: Sequence[Part]
    no_op: bool  # equal to one of the parts
    allowed: Mapping[str, Mapping[str, Any]]  # differing config key → each folder's value

    @property
    def reference(self) -> Checkpoint:
        return self.parts[-1].checkpoint


def linear_blend(parts: Sequence[Part], allow_different: Sequence[str] = ()) -> Blend:
    """Return Σ share · tensor over the parts, float32 (float64 of float64). Shares must sum to 1; they may be negative.

    Raises SettingsError on shares that do not sum to 1, MismatchError on differing configs or tensors, DamagedFileError
    on a file that is not what was saved, NumericsError naming file, tensor and index of a NaN or infinity.
    """
    total = math.fsum(part.share for part in parts)
    if not abs(total - 1) <= 1e-9:
        raise SettingsError(f"blend shares sum to {total:.6g}, must sum to 1")
    allowed = allowed_differences([part.checkpoint for part in parts], allow_different)
    names = _common_names(parts)
    digests = [hashlib.sha256() for _ in parts]
    equal = set(range(len(parts)))  # parts that the result has equalled so far
    blended = {}
    with progress_bar("blending", len(names), "tensors") as advance:
        for name in names:
            blended[name] = _blend_tensor(parts, name, digests)
            equal = {i for i in equal if _equals(parts[i], name, blended[name])}
            advance()
    for part, digest in zip(parts, digests, strict=True):
        part.checkpoint.require_id(part.view, view_id_of(digest.hexdigest(), part.checkpoint.config))
    return Blend(blended, parts, bool(equal), allowed)


def _blend_tensor(parts: Sequence[Part], name: str, digests: Sequence[Any]) -> Tensor:
    """Return one tensor of the blend. Its parts are read one at a time, and update the digests of their files."""
    total, dtypes = None, [torch.float32]
    for part, digest in zip(parts, digests, strict=True):
        tensor = read_tensor(part.path, name)
        check_finite(name, tensor, str(part.path))
        update_digest(digest, name, tensor)
        dtypes.append(tensor.dtype)
        term = part.share * tensor.double()
        total = term if total is None else total.add_(term)  # from the first term on, so that -0.0 stays -0.0
        del tensor
    assert total is not None
    result = total.to(reduce(torch.promote_types, dtypes))
    check_finite(name, result, "the blend")
    return result


def _equals(part: Part, name: str, blended: Tensor) -> bool:
    return torch.equal(read_tensor(part.path, name).to(blended.dtype), blended)


def read_tensor(path: Path, name: str) -> Tensor:
    """Return one tensor of a memory-mapped safetensors file. Raises DamagedFileError."""
    try:
        with safe_open(path, "pt") as file:
            return file.get_tensor(name)
    except (SafetensorError, OSError, ValueError) as error:
        raise DamagedFileError(f"{path} is damaged: {error}", hint="pgolf-post checkpoint list") from None


def _common_names(parts: Sequence[Part]) -> list[str]:
    """Return tensor names in order. Raises MismatchError if a part does not fit the config, NotFoundError."""
    module = build_module(parts[-1].checkpoint.config)
    for part in parts:
        check_tensors(module, _stand_ins(part.path), str(part.path))
    return sorted(module.state_dict())


def _stand_ins(path: Path) -> dict[str, Tensor]:
    """Return a file's tensors on the meta device, without values."""
    if not path.is_file():
        raise NotFoundError(absent(path))
    try:
        with safe_open(path, "pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise DamagedFileError(f"{path} is damaged: {error}", hint="pgolf-post checkpoint list") from None
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def allowed_differences(checkpoints: Sequence[Checkpoint], allow: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the config keys in which checkpoints differ, all of them allowed by name.

    Raises MismatchError listing those that are not, SettingsError for a name that is no config key.
    """
    known = sorted({key for checkpoint in checkpoints for key in flat_config(checkpoint.config)})
    for key in allow:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=3)
            raise SettingsError(f"--allow-different {key}: no such config key (near: {', '.join(close) or 'none'})")
    differences = config_differences(checkpoints)
    refused = [f"{key}: {_values(values)}" for key, values in differences.items() if key not in allow]
    if refused:
        names = " and ".join(dict.fromkeys(checkpoint.path.name for checkpoint in checkpoints))
        keys = " ".join(f"--allow-different {key}" for key in differences if key not in allow)
        raise MismatchError(
            f"{names} differ in config: {'; '.join(refused)}",
            hint=f"if they may, say so: {keys}   (the result is then like {checkpoints[-1].path.name})",
        )
    return differences


def _values(values: Mapping[str, Any]) -> str:
    return " / ".join(repr(value) for value in values.values())


def swa_parts(final: Checkpoint, ema_share: float, selection: Selection = DEFAULT_SELECTION) -> list[Part]:
    """Return the members' raw weights, interpolated with the final EMA by `ema_share` in [0, 1]."""
    if not 0 <= ema_share <= 1:
        raise SettingsError(f"--ema-share {ema_share} is outside 0..1")
    parts = []
    if ema_share < 1:
        members = select_members(final, selection)
        shares = member_shares(members, selection)
        parts = [Part(member, "raw", (1 - ema_share) * share) for member, share in zip(members, shares, strict=True)]
    if ema_share > 0:
        parts.append(Part(final, final.view_name("ema"), ema_share))
    return parts


def swa_blend(
    final: Checkpoint,
    ema_share: float,
    data: DataFolder,
    selection: Selection = DEFAULT_SELECTION,
    allow_different: Sequence[str] = (),
) -> tuple[Checkpoint, bool]:
    """Save SWA of a run's checkpoints, interpolated with the final EMA; return it and whether it was there already.

        >>> blend, was_there = pg.swa_blend(pg.Checkpoint.open(path), ema_share=0.75, data=data)

    Raises NotFoundError if the run has too few checkpoints, MismatchError for one that does not fit the others.
    """
    require_trained(final)
    blend = linear_blend(swa_parts(final, ema_share, selection), allow_different)
    return save_blend(blend, "swa", data, {"ema_share": ema_share})


def swa(final: Checkpoint, settings: SwaSettings, data: DataFolder) -> tuple[Checkpoint, bool]:
    """Make the average "swa" of the table of methods; see `swa_blend`."""
    return swa_blend(final, settings.ema_share, data, settings.selection, settings.allow_different)


def require_trained(final: Checkpoint) -> None:
    """Raise MismatchError unless a checkpoint is a training run's own or an imported one."""
    kind = final.meta.get("kind")
    if kind not in ("raw", "imported"):
        raise MismatchError(
            f"{final.path} is a {kind!r} checkpoint; SWA starts from a training run's",
            hint="to blend it with others by name: pgolf-post swa-blend --part PATH[:VIEW]=SHARE …",
        )


def save_blend(blend: Blend, kind: str, data: DataFolder, facts: Mapping[str, Any]) -> tuple[Checkpoint, bool]:
    """Write a blend beside its last part, its metric measured on `data`. Return it and whether it was there already.

    The folder's name holds its content id, so the same blend is found again and another never overwrites it.
    """
    reference = blend.reference
    blend_id = view_id(blend.tensors, reference.config)
    path = reference.path.parent / f"{kind}_{blend_id[:12]}"
    if (path / "meta.json").is_file():
        say(f"{path}: cached")
        return Checkpoint.open(path), True
    for key, values in blend.allowed.items():
        say(f"{key} differs ({_values(values)}); the result takes that of {reference.path.name}")
    if blend.no_op:
        say("NO-OP: the blend equals one of its parents")
    inherited = {key: reference.meta[key] for key in INHERITED if key in reference.meta}
    meta = {"kind": kind, "phase": "blend", "parents": [part.facts() for part in blend.parts], **inherited, **facts}
    meta |= {"no_op": blend.no_op, "allowed_differences": dict(blend.allowed)}
    metric = measure(reference, blend.tensors, data)
    return save_checkpoint(path, reference.config, {"raw": blend.tensors}, meta, {"raw": metric}), False
