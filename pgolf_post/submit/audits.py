"""The audit of an artifact under a protocol: the ledger's, or made now and kept in the ledger."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from pgolf_post.base.progress import say
from pgolf_post.data import DataFolder
from pgolf_post.errors import NotFoundError
from pgolf_post.ledger import Ledger, Row
from pgolf_post.ledger.comparison import audit_row
from pgolf_post.ledger.disk import rows_at
from pgolf_post.ledger.recording import record
from pgolf_post.score.audit.findings import Finding
from pgolf_post.score.audit.stage import audit
from pgolf_post.score.protocols import Protocol
from pgolf_post.submit.seeds import Seed


def audited(
    seed: Seed, data: DataFolder, protocol: Protocol, tokens: int | None, make: bool
) -> list[Finding] | None:  # tokens: of the excerpt; None: as the protocol needs, or as many as a recorded audit had
    """Return the findings on an artifact under a protocol: the ledger's newest, or made now and recorded.

    None if the ledger has none and `make` is False.
    """
    settings = audit_settings(data, protocol)
    subject = rows_at(seed.artifact.absolute().parent)[-1]
    row = recorded(seed, subject.id, settings, tokens)
    if row is not None:
        say(f"{seed.name}: audited {row.created[:16].replace('T', ' ')} UTC (ledger {row.id[:12]})")
    elif make:
        say(f"{seed.name}: auditing {seed.artifact}, for the ledger has no audit of it by this protocol")
        row = _made(seed, data, protocol, tokens, settings, subject)
    else:
        return None
    return [Finding(test["test"], test["passed"], test["evidence"]) for test in row.result["tests"]]


def audit_settings(data: DataFolder, protocol: Protocol) -> dict[str, Any]:
    """Return what an audit is recorded under: the protocol and the text, however much of it is then scored."""
    return {
        "protocol": protocol.model_copy(update={"max_tokens": None}).model_dump(mode="json"),
        "data_manifest_sha256": data.manifest_sha256,
    }


def recorded(seed: Seed, subject_id: str, settings: Mapping[str, Any], tokens: int | None) -> Row | None:
    """Return the newest audit that the ledger has of a row by these settings, over so long an excerpt; else None."""
    try:
        with Ledger.open(seed.checkpoint.path.parent.parent, read_only=True) as ledger:
            rows = [row for row in ledger.rows("audit") if subject_id in row.parents]
    except NotFoundError:
        return None
    fitting = [row for row in rows if _whole(row.settings) == settings]
    fitting = [row for row in fitting if tokens is None or row.result["excerpt_tokens"] == tokens]
    return fitting[-1] if fitting else None


def _whole(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {**settings, "protocol": {**settings["protocol"], "max_tokens": None}}


def _made(
    seed: Seed, data: DataFolder, protocol: Protocol, tokens: int | None, settings: Mapping[str, Any], subject: Row
) -> Row:
    started = time.perf_counter()
    result = audit(seed.artifact, data, protocol, tokens=tokens)
    seconds = round(time.perf_counter() - started, 3)
    tests = [finding.facts() for finding in result.findings]
    name = f"{protocol.protocol} of {seed.artifact}"
    row = audit_row(name, settings, tests, result.excerpt_tokens, subject.id, subject.run, seconds)
    record(seed.artifact.absolute().parent, rows=lambda: [row], seconds=seconds)
    return row
