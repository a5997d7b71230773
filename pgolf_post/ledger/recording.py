"""Recording: the one call by which a command writes into the ledger what it just did.

Recording comes last and never fails a command: the result is on disk and on the screen already. Whatever keeps the
ledger from being written (a read-only folder, a damaged file, a full disk) is a warning that says how to catch up.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pgolf_post.base.progress import say
from pgolf_post.ledger.disk import root_of, rows_at
from pgolf_post.ledger.schema import Row, iso_utc, priced
from pgolf_post.ledger.store import Ledger
from pgolf_post.provenance import accelerator_name, code_commit, command_line


def record(
    *folders: Path,
    rows: Callable[[], Iterable[Row]] | None = None,
    facts: Mapping[str, Any] | None = None,
    dollars_per_hour: float | None = None,
    seconds: float = 0.0,
    root: Path | None = None,
) -> bool:
    """Write the rows of folders (checkpoints or derived results) and further `rows`; False, with a warning, on failure.

    `facts` are result keys that only the command knows (counted code, budget), for the row of the first folder.
    `seconds` is how long the command has run: rows made within that time are its own, and get its commit,
    device and command.
    `root` is the checkpoint root; by default that of the first folder.
    """
    where = root
    try:
        places = [folder.absolute() for folder in folders]
        where = root or root_of(places[0] if places else None)
        by_id = {(row.kind, row.id): row for place in places for row in rows_at(place)}
        if facts:
            first = rows_at(places[0])[-1]
            by_id[first.kind, first.id] = replace(first, result={**first.result, **facts})
        since = iso_utc(time.time() - seconds - 1.0)
        every = [*by_id.values(), *(rows() if rows else ())]
        signed = [_signed(row) if row.created >= since else row for row in every]
        with Ledger.open(where) as ledger:
            ledger.complete_all([priced(row, dollars_per_hour) for row in signed])
    except Exception as error:  # whatever it is: the command's own result stands
        say(f"warning: not recorded in the ledger ({type(error).__name__}: {error})")
        say(f"the result is not affected; to record it later: pgolf-post ledger scan --root {where or 'FOLDER'}")
        return False
    return True


def _signed(row: Row) -> Row:
    """Return a row made just now, with the commit, device and command of this process where the row names none."""
    made: dict[str, Any] = {"commit": row.commit or code_commit(), "device": row.device or accelerator_name()}
    return replace(row, **made, command=row.command or command_line())
