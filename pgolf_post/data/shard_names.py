"""The shards that lie in a folder, by the challenge's names: a split is all of its numbers, each of them once.

A folder filled by a browser, a sync tool or a copy that stopped may hold a file twice, lack one in the middle, or have
one that is still on its way. In validation each of these changes what a score is measured on, so it is refused.
"""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pgolf_post.base.progress import say
from pgolf_post.errors import DamagedFileError, MismatchError, NotFoundError

SHARD = re.compile(r"fineweb_(?P<kind>train|val_bytes|val)_(?P<number>[0-9]+)\.bin")
UNFINISHED = re.compile(r".*fineweb_.*\.(incomplete|part|partial|crdownload|download|aria2|tmp)|\.partial-.*fineweb_.*")


@dataclass(frozen=True)
class ShardNames:
    """File names inside a data folder, in order."""

    train: Sequence[str]
    val: Sequence[str]
    val_bytes: Sequence[str]  # byte sidecars of val; may be empty


def find_shards(folder: Path) -> ShardNames:
    """Return the challenge's file names in `folder`, by number.

    Raises NotFoundError if none is a validation shard, DamagedFileError for an unfinished download, MismatchError for
    names without a number and for numbers that are missing from validation; says which are missing from training.
    """
    present = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    _refuse_unfinished(folder, present)
    candidates = [name for name in present if name.startswith(("fineweb_train_", "fineweb_val_"))]
    named = [name for name in candidates if name.endswith(".bin")]
    numbered = {name: match for name in named if (match := SHARD.fullmatch(name))}
    _refuse_unnumbered(folder, [name for name in named if name not in numbered])
    kinds: dict[str, list[str]] = {"train": [], "val": [], "val_bytes": []}
    for name in sorted(numbered, key=lambda name: (int(numbered[name]["number"]), name)):
        kinds[numbered[name]["kind"]].append(name)
    if not kinds["val"]:
        raise _without_validation(folder, present)
    for kind, names in kinds.items():
        _refuse_gaps(folder, kind, [int(numbered[name]["number"]) for name in names])
    return ShardNames(**kinds)


def _refuse_unfinished(folder: Path, present: Sequence[str]) -> None:
    """Raise DamagedFileError for what a download has not finished; some tools give the target its full size first."""
    unfinished = [name for name in present if UNFINISHED.fullmatch(name)]
    if unfinished:
        raise DamagedFileError(
            f"{folder} has a download that is not finished: {', '.join(unfinished)}",
            hint="finish that download, then run this again",
        )


def _refuse_unnumbered(folder: Path, names: Sequence[str]) -> None:
    """Raise MismatchError for a copy such as `fineweb_val_000000 (1).bin`: a copy is not more text."""
    if names:
        path = shlex.quote(str(folder / names[0]))
        raise MismatchError(
            f"{folder}: {', '.join(names)}: not named like a shard, which is fineweb_train_ or fineweb_val_ and a "
            "number; a copy would count as more text",
            hint=f"mv {path} {path}.copy",
        )


def _refuse_gaps(folder: Path, kind: str, numbers: Sequence[int]) -> None:
    """Raise MismatchError for numbers that validation lacks or has twice; say which numbers training lacks."""
    twice = [number for number, after in itertools.pairwise(numbers) if number == after]
    if twice:
        raise MismatchError(f"{folder} has two {kind} shards with number {twice[0]}", hint="move one of them away")
    if not numbers:
        return
    first = numbers[0] if kind == "train" else 0
    missing = sorted({*range(first, numbers[-1] + 1)} - {*numbers})
    if not missing:
        return
    listed = ", ".join(f"fineweb_{kind}_{number:06d}.bin" for number in missing[:5])
    listed += f" and {len(missing) - 5} more" if len(missing) > 5 else ""
    if kind == "train":
        say(f"{folder} lacks {listed}: it trains on the others")
        return
    raise MismatchError(
        f"{folder} lacks {listed}: a score needs the whole validation split",
        hint="fetch what is missing; if the shards there are the whole text, number them from 000000",
    )


def _without_validation(folder: Path, present: Sequence[str]) -> NotFoundError:
    """Return the error for a folder without validation shards; it lists what lies there instead."""
    if not folder.is_dir():
        return NotFoundError(f"no folder {folder}", hint="pgolf-post data download")
    others = [name for name in present if name.endswith(".bin") and not name.startswith(".")]
    if any(name.startswith("fineweb_train_") for name in others):
        return NotFoundError(
            f"{folder} has no fineweb_val_*.bin, only training shards; scores need a validation split",
            hint=f"copy the validation shards that were made with the same tokenizer to {folder}",
        )
    if others:
        example = next((name for name in others if "val" in name), others[0])
        source, target = (shlex.quote(str(folder / name)) for name in (example, "fineweb_val_000000.bin"))
        return NotFoundError(
            f"{folder} has no fineweb_val_*.bin; the .bin files there are {', '.join(others[:5])}",
            hint=f"name them fineweb_val_ and fineweb_train_ with six digits from 000000, as in: mv {source} {target}",
        )
    return NotFoundError(f"{folder} has no fineweb_val_*.bin", hint="pgolf-post data download")
