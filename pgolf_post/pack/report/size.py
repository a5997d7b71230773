"""Counting against the budget: the real files, to the byte.

A submission is its code plus its compressed weights, and the limit is decimal: 16,000,000 bytes pass, 16,000,001 do
not. So nothing is estimated and nothing is left out silently: sizes are read from the files on disk, every file of a
code folder counts, and a code file that is missing is an error, because counting it as 0 bytes would pass a submission
that is over.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pgolf_post.base.paths import absent
from pgolf_post.errors import NotFoundError, OverBudgetError, SettingsError
from pgolf_post.pack.artifact import ArtifactFacts
from pgolf_post.pack.payload import read_script
from pgolf_post.pack.script import local_imports, pack_source

BUDGET_BYTES = 16_000_000
SKIPPED_FOLDERS = {"__pycache__"}  # written by Python while it runs, not part of a submission


@dataclass(frozen=True)
class FileBytes:
    """One counted file."""

    path: Path
    num_bytes: int


@dataclass(frozen=True)
class SizeReport:
    """Counted bytes, file by file, compared with the budget."""

    artifact: FileBytes
    code: tuple[FileBytes, ...]
    budget_bytes: int
    wrapped: tuple[FileBytes, ...] = ()  # the code again, every Python file as `pack-code` makes it
    by_convention: bool = False  # whether the totals count the wrapped code

    @property
    def artifact_bytes(self) -> int:
        return self.artifact.num_bytes

    @property
    def code_bytes(self) -> int:
        return sum(file.num_bytes for file in (self.wrapped if self.by_convention else self.code))

    @property
    def strict_total_bytes(self) -> int:
        """The real files as they lie on disk."""
        return self.artifact_bytes + sum(file.num_bytes for file in self.code)

    @property
    def convention_total_bytes(self) -> int:
        """Weights and the code after wrapping."""
        return self.artifact_bytes + sum(file.num_bytes for file in self.wrapped)

    @property
    def total_bytes(self) -> int:
        return self.artifact_bytes + self.code_bytes

    @property
    def headroom_bytes(self) -> int:
        """Bytes left under the budget; negative when over it."""
        return self.budget_bytes - self.total_bytes

    def facts(self) -> dict[str, int]:
        """Return the count for `--json` and the ledger, all in bytes."""
        return {
            "artifact_bytes": self.artifact_bytes,
            "code_bytes": self.code_bytes,
            "total_bytes": self.total_bytes,
            "budget_bytes": self.budget_bytes,
            "headroom_bytes": self.headroom_bytes,
        }

    @property
    def over(self) -> bool:
        return self.headroom_bytes < 0

    def require_within_budget(self) -> None:
        """Raise OverBudgetError saying by how many bytes, if over."""
        if self.over:
            raise OverBudgetError(
                f"{self.total_bytes:,} bytes are {-self.headroom_bytes:,} over the budget of {self.budget_bytes:,}",
                hint="lower the artifact's bytes with pgolf-post requant: a larger --clip or fewer --embed-bits",
            )


@dataclass(frozen=True)
class UnitBytes:
    """Stored bytes of one unit of an artifact; the units add up to the artifact's size."""

    role: str
    codec: str
    stored_bytes: int
    num_weights: int  # factors or passthrough values in units of those; 0 for the manifest and the coder's own

    @property
    def bits_per_weight(self) -> float | None:
        """Stored bits per weight; None for a unit without weights."""
        return 8 * self.stored_bytes / self.num_weights if self.num_weights else None


def count(
    artifact: Path | str, code: Sequence[Path] = (), budget_bytes: int = BUDGET_BYTES, by_convention: bool = False
) -> SizeReport:
    """Count one artifact (any file) and the code: files, all files of folders, and what files import beside them.

        >>> pg.size(artifact.path, code=[Path("train_gpt.py")]).headroom_bytes

    A file named twice counts once. With `by_convention` the report's totals count the code as `pack-code` makes it.

    Raises NotFoundError for anything that is not there, SettingsError for a negative budget.
    """
    if budget_bytes < 0:
        raise SettingsError(f"budget of {budget_bytes:,} bytes: it cannot be negative")
    artifact = Path(artifact)
    if not artifact.is_file():
        raise NotFoundError(absent(artifact, "artifact file"), hint="pgolf-post requant writes one")
    counted = {_identity(artifact)}
    files = []
    for path in _code_files(code):
        if _identity(path) not in counted:
            counted.add(_identity(path))
            files.append(FileBytes(path, path.stat().st_size))
    size, wrapped = FileBytes(artifact, artifact.stat().st_size), tuple(map(_wrap, files))
    return SizeReport(size, tuple(files), budget_bytes, wrapped, by_convention)


def count_code(code: Sequence[Path]) -> int:
    """Return the bytes of the code alone, as `count` counts it."""
    return sum(path.stat().st_size for path in {_identity(path): path for path in _code_files(code)}.values())


def _wrap(file: FileBytes) -> FileBytes:
    """Return a Python file as the convention counts it, if that is smaller; any other file as it is."""
    if file.path.suffix != ".py" or file.num_bytes == 0:
        return file
    try:
        packed = len(pack_source(read_script(file.path)).data)
    except SettingsError:  # not Python, whatever its name: it is counted as it lies there
        return file
    return FileBytes(file.path, min(packed, file.num_bytes))


def _identity(path: Path) -> str:
    """Return where a path leads without following links: a link beside its target is a second file of a submission."""
    return os.path.abspath(path)  # noqa: PTH100 (Path.resolve follows links)


def _code_files(code: Sequence[Path]) -> Iterator[Path]:
    """Yield files, all files of folders, and what files import."""
    named = [file for path in code for file in (_files_below(path) if path.is_dir() else [path])]
    for path in code:
        if path.is_dir():
            yield from _files_below(path)
        elif path.is_file():
            yield path
            if path.suffix == ".py":
                yield from local_imports(path, named)
        else:
            raise NotFoundError(f"{absent(path, 'code file')}; a missing file is never counted as 0 bytes")


def _files_below(folder: Path) -> list[Path]:
    """Return all files of a folder in name order. Raises NotFoundError if there are none or one cannot be counted."""
    files: list[Path] = []
    for parent, folders, names in os.walk(folder, onerror=_refuse):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]
        files += [Path(parent) / name for name in names]
        files += [Path(parent) / name for name in folders if (Path(parent) / name).is_symlink()]
    for path in files:
        if not path.is_file():
            raise NotFoundError(f"{path} is a link or special file that cannot be counted", hint="name its target")
    if not files:
        raise NotFoundError(f"code folder {folder} holds no files; it is not counted as 0 bytes")
    return sorted(files)


def _refuse(error: OSError) -> None:
    raise NotFoundError(f"cannot list code folder: {error}") from error


def unit_table(facts: ArtifactFacts) -> list[UnitBytes]:
    """Return the stored bytes per unit of one of our artifacts (`artifact.read_facts`), in file order."""
    return [UnitBytes(unit.label or "manifest", unit.codec, unit.stored_bytes, unit.num_values) for unit in facts.units]
