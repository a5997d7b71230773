"""Report of a data folder for people: the sizes of its splits, and the checks that it passed or failed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pgolf_post.data.check import CheckRow
from pgolf_post.data.folder import DataFolder

SPLIT_HEADER = ("split", "documents", "bytes", "tokens", "bytes/token")
CHECK_HEADER = ("check", "result", "evidence")
COUNTS = ("num_documents", "num_bytes", "num_tokens")


def split_counts(folder: DataFolder) -> dict[str, dict[str, int]]:
    """Return split → its numbers of documents, bytes of text and tokens, as the manifest states them."""
    return {split: {key: entry[key] for key in COUNTS} for split, entry in folder.manifest["splits"].items()}


def split_rows(folder: DataFolder) -> list[tuple[str, ...]]:
    """Return one row of cells under SPLIT_HEADER for each split."""
    rows = []
    for split, counts in split_counts(folder).items():
        ratio = f"{counts['num_bytes'] / counts['num_tokens']:.3f}" if counts["num_tokens"] else "-"
        rows.append((split, *(f"{counts[key]:,}" for key in COUNTS), ratio))
    return rows


def build_answer(folder: DataFolder, seconds: float) -> dict[str, Any]:
    """Return the JSON answer of a command that made `folder`."""
    return {
        "path": str(folder.path),
        "name": folder.name,
        "manifest_sha256": folder.manifest_sha256,
        "vocab_size": folder.vocab_size,
        "splits": split_counts(folder),
        "seconds": round(seconds, 3),
    }


def check_rows(checks: Sequence[CheckRow]) -> list[tuple[str, ...]]:
    """Return one row of cells under CHECK_HEADER for each check."""
    return [(check.name, "ok" if check.passed else "FAILED", check.evidence) for check in checks]


def check_answer(folder: DataFolder, checks: Sequence[CheckRow]) -> dict[str, Any]:
    """Return the JSON answer of `data check`."""
    listed = [{"name": check.name, "passed": check.passed, "evidence": check.evidence} for check in checks]
    return {"path": str(folder.path), "passed": all(check.passed for check in checks), "checks": listed}
