"""The progress of an interrupted stage in one file: tensors, JSON facts, and a hash over the tensors.

It is written in one rename and read whole or not at all, so that a stage either resumes from it or starts again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pgolf_post.base.storage import atomic_file, disk_errors, tensors_sha256
from pgolf_post.errors import DamagedFileError


def write_partial(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write the file, replacing an older one. Raises PgolfError if the disk refuses it."""
    facts = {**facts, "sha256": tensors_sha256(tensors)}
    with atomic_file(path) as temporary, disk_errors():
        save_file(dict(tensors), temporary, {"facts": json.dumps(facts)})


def read_partial(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return facts and tensors. Raises DamagedFileError if the file is not exactly as it was written."""
    try:
        with safe_open(path, framework="pt") as file:
            facts: dict[str, Any] = json.loads(file.metadata()["facts"])
            tensors: dict[str, Tensor] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        if facts["sha256"] != tensors_sha256(tensors):
            raise DamagedFileError("the tensors do not have the recorded sha256")
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise DamagedFileError(str(error)) from error
    return facts, tensors
