"""The recipes of a ladder, read before the first is trained: a mistake in the last would cost the runs before it.

Two sizes that are one recipe are found here. All else (keys that no recipe has, values out of range, a model that
cannot be built) is what the trainer says of each in a dry run with a given step time, which measures nothing.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pgolf_post.base.progress import progress_bar, say
from pgolf_post.data import DataFolder
from pgolf_post.errors import SettingsError
from pgolf_post.settings import apply_override, read_toml
from pgolf_post.sizing.text import Texts, same_text
from pgolf_post.sweep.trainer_process import as_toml

DRY_RUN_SECONDS = 300.0  # that the trainer has to answer


def require_trainable(
    recipe: Path,
    sizes: Sequence[Sequence[str]],
    tried: Sequence[Sequence[str]],
    eval_tokens: int | None,
    scratch: Path,  # folder that recipes are written to
) -> Texts:
    """Raise SettingsError for a recipe that cannot be trained, or that is there twice; return what texts are read.

    Raises what `same_text` does for data folders of different texts.
    """
    trees = require_different(recipe, sizes, tried)
    folders = dict.fromkeys(str(tree.get("data", {}).get("dir", "")) for tree in trees.values())
    texts = same_text([DataFolder.open(Path(folder)) for folder in folders], eval_tokens)
    with progress_bar("reading recipes", len(trees), "recipes") as advance:
        for words, tree in trees.items():
            require_readable(words, tree, scratch)
            advance(note=words)
    return texts


def require_different(
    recipe: Path, sizes: Sequence[Sequence[str]], tried: Sequence[Sequence[str]] = ()
) -> dict[str, dict[str, Any]]:
    """Return every recipe by the options that make it.

    Raises SettingsError for a change that is none, or for two sizes or variants that are one recipe.
    """
    seen, trees = dict[str, str](), dict[str, dict[str, Any]]()
    for number, changes in enumerate(sizes, start=1):
        for variant in ((), *tried):
            tree = read_toml(recipe)
            for change in (*changes, *variant):
                apply_override(tree, change)
            what = f'size {number}, --size "{" ".join(changes)}"'
            what += f' with --try "{" ".join(variant)}"' if variant else ""
            if (before := seen.setdefault(as_toml(tree), what)) != what or what in trees:
                raise SettingsError(
                    f"{what}, is the same recipe as {before.partition(',')[0]}: the law would count its runs twice",
                    hint="leave one of the two out",
                )
            trees[what] = tree
    return trees


def require_readable(words: str, tree: dict[str, Any], scratch: Path) -> None:
    """Raise SettingsError with the trainer's reason if it refuses to read a recipe; print what else it finds."""
    scratch.mkdir(parents=True, exist_ok=True)
    path = scratch / "to_be_read.toml"
    path.write_text(as_toml(tree), encoding="utf-8")
    command = [sys.executable, "-m", "trainer", str(path), "--dry-run", "--step-seconds", "1", "--json"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=DRY_RUN_SECONDS)
    finally:
        path.unlink(missing_ok=True)
    if not done.returncode:
        return
    lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
    reason = next((line for line in lines if line.startswith("error: ")), lines[-1] if lines else "no message")
    reason = reason.removeprefix("error: ").replace(f"{path}: ", "")
    if done.stdout.strip().startswith("{"):  # it was read and built; a setting that cannot act is the user's to judge
        say(f"{words}: {reason}")
        return
    raise SettingsError(f"{words}: {reason}", hint="mend it; nothing was trained yet")
