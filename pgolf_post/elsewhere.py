"""Results of a checkpoint that lies where nobody may write: kept under another folder, in the same layout.

`ROOT/RUN/CHECKPOINT` gets links to the checkpoint's files, links to the results that lie beside it, and a `derived`
folder of its own. It opens like the checkpoint itself, so that every command finds, lists, scores and deletes what is
in it by the same rules, whether it is given the checkpoint and ROOT again, or that folder.
"""

from __future__ import annotations

from pathlib import Path

from pgolf_post.base.storage import atomic_symlink
from pgolf_post.checkpoint import Checkpoint
from pgolf_post.derived import derived_folders
from pgolf_post.errors import DamagedFileError, MismatchError, NotFoundError


def results_in(checkpoint: Checkpoint, root: Path) -> Checkpoint:
    """Return the checkpoint as a folder under `root`, made if it is not there; what is there already is used again.

        >>> view = results_in(pg.Checkpoint.open(path), Path("results")).load()

    Raises MismatchError if that folder holds another checkpoint's results, PgolfError if it cannot be written.
    """
    source = checkpoint.path.resolve()
    home = root.resolve() / source.parent.name / source.name
    if home == source:
        return checkpoint
    _require_same(home, checkpoint)
    for path in sorted(source.iterdir(), key=lambda path: path.name == "meta.json"):  # last, as when it was written
        if path.name != "derived" and not path.name.startswith("."):
            _link(home / path.name, path)
    for folder in derived_folders(source):
        place = home / folder.relative_to(source)
        if not place.exists():
            _link(place, folder)
    return Checkpoint.open(home)


def _require_same(home: Path, checkpoint: Checkpoint) -> None:
    """Raise MismatchError if a folder's results are of other weights than the checkpoint's."""
    try:
        present = Checkpoint.open(home)
    except (NotFoundError, DamagedFileError):  # new, or its links lead nowhere any more
        return
    if present.meta["id"] != checkpoint.meta["id"]:
        raise MismatchError(
            f"{home} has results of checkpoint {str(present.meta['id'])[:12]}, {checkpoint.path} is "
            f"{str(checkpoint.meta['id'])[:12]}",
            hint="--derived names another folder",
        )


def _link(link: Path, target: Path) -> None:
    """Point a link at a file or folder unless it points there. Raises PgolfError if it cannot be written."""
    if not link.is_symlink() or not link.exists() or link.resolve() != target.resolve():
        atomic_symlink(link, target)
