"""Reading a log of any known form: a run's folder, its train.jsonl, a public script's log, a table.

The form is told from the content, never from the file's name alone.
"""

from __future__ import annotations

from pathlib import Path

from pgolf_post.base.paths import absent, followed
from pgolf_post.base.text import decode_text
from pgolf_post.curves.curve import Log
from pgolf_post.curves.gathering import Gathering
from pgolf_post.curves.own_log import LOG_FILE, gather_own, is_own, phase_steps, saved_metrics
from pgolf_post.curves.public_log import gather_public
from pgolf_post.curves.table_log import gather_table
from pgolf_post.errors import MismatchError, NotFoundError

FORMS = "a run's folder, a train.jsonl, a public script's training log, or CSV with a column `step`"


def read_log(path: Path | str) -> Log:
    """Return the curves in a run's folder or a log's file.

        >>> pg.read_log("train_seed42.log").curve("train_loss").values

    Raises NotFoundError if nothing is there, MismatchError if no curve is in it.
    """
    path = Path(path)
    if path.is_dir():
        return _read_run(path)
    if not path.is_file():
        raise NotFoundError(absent(path, "log"), hint=f"pgolf-post curves takes {FORMS}")
    text = decode_text(path.read_bytes(), errors="replace")
    if is_own(text):
        gathering, torn = gather_own(text)
        return _log(path, "train.jsonl", gathering, torn)
    table = gather_table(text)
    if table is not None:
        return _log(path, "table", table)
    return _log(path, "a public script's log", gather_public(text))


def _read_run(folder: Path) -> Log:
    """Return the curves of a run's folder: its log's and its checkpoints'; of a checkpoint's folder, its run's."""
    run = followed(folder)
    if not (run / LOG_FILE).is_file() and (run.parent / LOG_FILE).is_file():
        run = run.parent
    log = run / LOG_FILE
    gathering, torn = gather_own(decode_text(log.read_bytes(), errors="replace")) if log.is_file() else (Gathering(), 0)
    # Two checkpoints of one step may have other metrics: the newer counts, and is no restart.
    for (curve, _), point in {(name, one.step): one for name, one in saved_metrics(run)}.items():
        gathering.add(curve, point)
    return _log(run, "run", gathering, torn, phase_steps(run))


def _log(path: Path, form: str, gathering: Gathering, torn: int = 0, phases: dict[str, float] | None = None) -> Log:
    curves = gathering.curves()
    if not curves:
        raise MismatchError(f"{path} holds no curve: no line of it reports a loss at a step", hint=f"give {FORMS}")
    notes = gathering.notes() + ([f"{torn} torn lines left out"] if torn else [])
    return Log(path, form, curves, notes, phases)
