"""Audits that are kept: the challenge's rules tested on an artifact under a protocol, once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pgolf_post.base.storage import write_json
from pgolf_post.data import DataFolder
from pgolf_post.derived import Stage
from pgolf_post.score.audit.findings import Finding
from pgolf_post.score.audit.stage import audit
from pgolf_post.score.protocols import Protocol
from pgolf_post.submit.seeds import Seed

AUDIT = Stage("audit", 1, "findings.json")


def kept_audit(
    seed: Seed, data: DataFolder, protocol: Protocol, tokens: int | None, make: bool
) -> list[Finding] | None:
    """Return an artifact's findings under a protocol, kept or made now; None if there are none and `make` is False."""
    identity = {
        **protocol.model_copy(update={"max_tokens": None}).model_dump(mode="json"),
        "data_manifest_sha256": data.manifest_sha256,
        "excerpt_tokens": tokens,
    }
    folder = AUDIT.folder(seed.checkpoint.path / "derived", AUDIT.id([seed.sha256], identity))
    if AUDIT.intact_meta(folder) is None:
        if not make:
            return None
        AUDIT.store(folder, identity, lambda building: _write(building, seed, data, protocol, tokens))
    rows = json.loads((folder / AUDIT.payload).read_text("utf-8"))["findings"]
    return [Finding(row["test"], row["passed"], row["evidence"]) for row in rows]


def _write(building: Path, seed: Seed, data: DataFolder, protocol: Protocol, tokens: int | None) -> Mapping[str, Any]:
    result = audit(seed.artifact, data, protocol, tokens=tokens)
    write_json(building / AUDIT.payload, {"findings": [finding.facts() for finding in result.findings]})
    return {"passed": result.passed, "subject_id": seed.sha256, "excerpt_tokens": result.excerpt_tokens}
