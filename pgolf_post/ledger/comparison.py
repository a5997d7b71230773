"""Comparisons and audits as ledger rows: what was examined, how, what came out, and what it was made of."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pgolf_post.ledger.disk import rows_at
from pgolf_post.ledger.schema import Row
from pgolf_post.settings import canonical_json


def comparison_row(
    candidate: str,
    control: str,
    facts: Mapping[str, Any],
    scored: Sequence[Path],
    options: Mapping[str, Any],
    seconds: float,
) -> Row:
    """The row of `compare CANDIDATE CONTROL`; the same numbers by the same options are the same row."""
    given = {key: value for key, value in options.items() if value not in (None, False, ()) and key != "data_dir"}
    settings = {"candidate": candidate, "control": control, **given}
    result = dict(facts)
    row_id = hashlib.sha256(canonical_json(["comparison", settings, result])).hexdigest()
    parents = tuple(dict.fromkeys(rows_at(folder.absolute())[-1].id for folder in scored))
    run = rows_at(scored[0].absolute())[-1].run if scored else ""
    name = f"{Path(candidate).name} against {Path(control).name}"
    return Row("comparison", row_id, parents, name, run, settings, result=result, seconds=seconds)


def audit_row(
    name: str,
    settings: Mapping[str, Any],
    tests: Sequence[Mapping[str, Any]],  # findings as JSON: test, passed, evidence
    excerpt_tokens: int,
    parent: str,  # id of the row of what was audited
    run: str,
    seconds: float,
) -> Row:
    """The row of an audit; the same findings on the same thing by the same settings are the same row."""
    passed = all(test["passed"] is not False for test in tests)
    result = {"passed": passed, "tests": [dict(test) for test in tests], "excerpt_tokens": excerpt_tokens}
    row_id = hashlib.sha256(canonical_json(["audit", parent, dict(settings), result])).hexdigest()
    return Row("audit", row_id, (parent,), name, run, dict(settings), result=result, seconds=seconds)
