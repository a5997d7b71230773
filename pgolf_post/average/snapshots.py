"""Snapshots of a run's power-function averages, which post-hoc EMA (`posthoc.py`) combines.

    checkpoints/<run>/power_ema/step_000312-sigma_0.05.safetensors

One file is one average at one step, appears by one atomic rename and is never changed. The file's own header describes
it: step, sigma, the run's progress, the model's runtime graph, and a sha256 of the tensors, checked by whoever
reads them. Tensors are the model's parameters in float32: bfloat16 would halve the disk space, but its rounding is as
large as what tells one average from another (docs/results/average.md).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pgolf_post.average.profiles import PowerLength
from pgolf_post.base.storage import atomic_file, disk_errors, tensors_sha256, update_digest
from pgolf_post.errors import DamagedFileError, MismatchError, NotFoundError
from pgolf_post.families import check_finite

FOLDER = "power_ema"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Snapshot:
    """One stored average, its tensors not yet read."""

    path: Path
    step: int
    sigma: float
    progress: float
    graph: dict[str, Any]
    tensors_sha256: str

    @property
    def length(self) -> PowerLength:
        return PowerLength(self.sigma)


def snapshot_path(run: Path, step: int, sigma: float) -> Path:
    """Return the path of a snapshot of a run."""
    return run / FOLDER / f"step_{step:06d}-sigma_{sigma:g}.safetensors"


def write_snapshot(
    run: Path, step: int, sigma: float, progress: float, graph: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> Path:
    """Write one average of a run, atomically; the same step and sigma replaces. Raises PgolfError if it cannot."""
    facts = {
        "format_version": FORMAT_VERSION,
        "step": step,
        "sigma": sigma,
        "progress": progress,
        "graph": dict(graph),
        "tensors_sha256": tensors_sha256(tensors),
    }
    destination = snapshot_path(run, step, sigma)
    with atomic_file(destination) as building, disk_errors():
        save_file(dict(tensors), building, {"power_ema": json.dumps(facts)})
    return destination


def read_snapshot(path: Path) -> Snapshot:
    """Read a snapshot's header. Raises DamagedFileError if it is not one."""
    try:
        with safe_open(path, "pt") as file:
            facts = json.loads(file.metadata()["power_ema"])
        if facts["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format_version {facts['format_version']!r}, this program reads {FORMAT_VERSION}")
        return Snapshot(
            path, int(facts["step"]), float(facts["sigma"]), float(facts["progress"]), dict(facts["graph"]),
            str(facts["tensors_sha256"]),
        )  # fmt: skip
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise DamagedFileError(f"{path} is not a snapshot of an average: {error}") from None


def list_snapshots(run: Path) -> list[Snapshot]:
    """Return every snapshot of a run, in step order, then by sigma. Raises DamagedFileError naming a damaged one."""
    snapshots = [read_snapshot(path) for path in run.glob(f"{FOLDER}/step_*.safetensors")]
    return sorted(snapshots, key=lambda snapshot: (snapshot.step, snapshot.sigma))


def drop_snapshots_after(run: Path, step: int) -> list[Path]:
    """Delete the snapshots that a killed run took after the checkpoint it goes on from. Returns what was deleted."""
    later = [snapshot.path for snapshot in list_snapshots(run) if snapshot.step > step]
    for path in later:
        path.unlink()
    return later


def adopt_snapshots(source: Path, run: Path, until_step: int) -> int:
    """Give a run that branches off another the other's snapshots up to a step, as hard links. Returns their number."""
    adopted = [snapshot.path for snapshot in list_snapshots(source) if snapshot.step <= until_step]
    for path in adopted:
        with atomic_file(run / FOLDER / path.name) as building:
            try:
                os.link(path, building)
            except OSError:  # another file system: a copy is the same file
                shutil.copyfile(path, building)
    return len(adopted)


def stream_tensors(snapshots: Sequence[Snapshot]) -> Iterator[tuple[str, list[Tensor]]]:
    """Yield (name, that tensor of each snapshot), one name at a time, so that no whole model is held.

    Raises MismatchError if their tensors differ in name or shape, NumericsError naming a NaN, and after the last tensor
    DamagedFileError if a file's bytes are not what was written.
    """
    with ExitStack() as stack:
        try:
            files = [stack.enter_context(safe_open(snapshot.path, "pt")) for snapshot in snapshots]
        except FileNotFoundError as error:
            raise NotFoundError(f"a snapshot went away: {error}") from None
        _require_same_tensors(snapshots, files)
        digests = [hashlib.sha256() for _ in snapshots]
        for name in sorted(files[0].keys()):
            tensors = [file.get_tensor(name) for file in files]
            for snapshot, digest, tensor in zip(snapshots, digests, tensors, strict=True):
                update_digest(digest, name, tensor)
                check_finite(name, tensor, str(snapshot.path))
            yield name, tensors
        for snapshot, digest in zip(snapshots, digests, strict=True):
            if digest.hexdigest() != snapshot.tensors_sha256:
                raise DamagedFileError(
                    f"{snapshot.path} changed after it was written (sha256 of its tensors)",
                    hint=f"move it away; the other snapshots of {snapshot.path.parent} still give averages",
                )


def _require_same_tensors(snapshots: Sequence[Snapshot], files: Sequence[Any]) -> None:
    shapes = [{name: tuple(file.get_slice(name).get_shape()) for name in file.keys()} for file in files]  # noqa: SIM118
    for snapshot, held in zip(snapshots, shapes, strict=True):
        differing = sorted(held.items() ^ shapes[0].items())
        if differing:
            raise MismatchError(f"{snapshot.path} and {snapshots[0].path} hold different tensors: {differing[0]}")
