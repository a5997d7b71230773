"""Needs of a recipe: its data, complete and of one tokenizer, and a trainer that would start it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from pgolf_post.base.storage import sha256_file
from pgolf_post.data import DataFolder
from pgolf_post.data.shards import read_shard
from pgolf_post.doctor.findings import Finding, failed, ok
from pgolf_post.errors import PgolfError
from pgolf_post.settings import read_toml

DRY_RUN_SECONDS = 120


def read_recipe(path: Path) -> dict[str, Any]:
    """Return a recipe's tables. Raises SettingsError, NotFoundError."""
    return read_toml(path)


def checkpoint_root(recipe: dict[str, Any]) -> Path:
    """Return where a recipe's checkpoints go."""
    return Path(recipe.get("run", {}).get("checkpoint_root", "checkpoints"))


def data(recipe: dict[str, Any]) -> list[Finding]:
    """Return whether the data is here, whole, and of the tokenizer that its manifest names."""
    where = Path(recipe.get("data", {}).get("dir", ""))
    try:
        folder = DataFolder.open(where)
        tokens = {split: _tokens(folder, split) for split in folder.manifest["splits"]}
        tokenizer = folder.path / folder.manifest["tokenizer"]["file"]
        if sha256_file(tokenizer) != folder.tokenizer_sha256:
            return [failed("data", f"{tokenizer} is not the manifest's tokenizer", f"pgolf-post data check {where}")]
    except PgolfError as error:
        return [failed("data", str(error), error.hint or "pgolf-post data --help")]
    counts = ", ".join(f"{count:,} {split} tokens" for split, count in tokens.items())
    return [ok("data", f"{folder.name}, vocabulary {folder.vocab_size:,}: {counts}")]


def _tokens(folder: DataFolder, split: Any) -> int:
    """Return the tokens of a split; its shards' lengths are read, their content is for `data check`."""
    counted = sum(len(read_shard(path)) for path in folder.shard_paths(split))
    stated = int(folder.manifest["splits"][split]["num_tokens"])
    if counted != stated:
        raise PgolfError(f"{folder.path}: {counted:,} {split} tokens, the manifest says {stated:,}")
    return counted


def dry_run(path: Path) -> list[Finding]:
    """Let the trainer itself judge the recipe: its plan, its disk space, its memory."""
    command = [sys.executable, "-m", "trainer", str(path), "--dry-run"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DRY_RUN_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return [failed("recipe", f"no answer in {DRY_RUN_SECONDS} s", " ".join(command[1:]))]
    lines = [line for line in (done.stderr + done.stdout).strip().splitlines() if line.strip()]
    if done.returncode != 0:
        wrong = next((line for line in lines if line.startswith("error")), lines[-1] if lines else "no message")
        return [failed("recipe", wrong.removeprefix("error: ")[:300], f"python -m trainer {path} --dry-run")]
    return [ok("recipe", f"{path}: the trainer would start it")]
