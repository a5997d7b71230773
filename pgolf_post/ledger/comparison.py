"""A comparison as a ledger row: what was compared, how, what came out, and the scores it rests on."""

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
