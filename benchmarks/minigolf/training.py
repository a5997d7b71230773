"""The training of a round: a run of its own, which every round with the same recipe, data, seed and seconds shares.

So two ways of rounding are compared on one checkpoint, and the second costs no training. The run's processor seconds
are on the account of each of them. Training goes on from its last checkpoint with the seconds of all its lives on the
clock.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.minigolf.settings import WINDOW_TOKENS, Round
from benchmarks.minigolf.spending import Account, Runner
from pgolf_post.base.storage import atomic_file
from pgolf_post.checkpoint import Checkpoint, list_checkpoints
from pgolf_post.data import DataFolder
from pgolf_post.errors import PgolfError, SettingsError
from pgolf_post.settings import apply_override, canonical_json, parse_settings
from pgolf_post.sweep.trainer_process import as_toml
from trainer.config import Recipe

ID_DIGITS = 12
FOLDER, ACCOUNT = "training", "processor_seconds.json"  # in the run's folder: the answer, seconds of all lives
METRIC_WINDOWS = 2  # of the trainer's own metric at the end of the run, which nobody reads


@dataclass(frozen=True)
class Training:
    """One run, below the checkpoint root of all rounds."""

    wanted: Round
    recipe: Mapping[str, Any]  # tables
    data: DataFolder
    root: Path
    seed: int
    scale: float
    runner: Runner

    def __post_init__(self) -> None:
        """Raise SettingsError for a recipe that cannot be trained so."""
        parse_settings(Recipe, self.tables, self.wanted.recipe)

    @property
    def budget_seconds(self) -> float:
        """Processor seconds of the training budget, the making of the artifact included."""
        return self.wanted.budget.train_seconds * self.scale

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The recipe without places and names: its clock counts processor seconds, and it saves what a kill needs."""
        tree = json.loads(json.dumps(self.recipe))
        for change in self.wanted.set:
            apply_override(tree, change)
        rounding, data = self.wanted.rounding, tree.setdefault("data", {})
        kept = rounding.reserve_seconds * self.scale + rounding.fixed_seconds
        if kept >= self.budget_seconds:
            raise SettingsError(
                f"round {self.wanted.name}: {kept:g} s are kept for rounding, of {self.budget_seconds:g} s in all",
                hint="a larger --scale, or less in rounding.reserve_seconds and rounding.fixed_seconds",
            )
        tree["run"] = {**tree.get("run", {}), "seed": self.seed, "threads": self.wanted.threads}
        schedule = {key: value for key, value in tree.get("schedule", {}).items() if key != "steps"}
        seconds = self.budget_seconds - kept
        tree["schedule"] = {**schedule, "seconds": seconds, "clock": "processor", "reserve_seconds": 0.0}
        tree["checkpoint"] = {
            "phases": [],
            "every_seconds": min(self.wanted.save_seconds, seconds / 2),
            "keep_last": 1,
            "keep_optimizer_state": "last",
            "metric": "final",
            "metric_tokens": METRIC_WINDOWS * int(data.get("seq_len", WINDOW_TOKENS)) + 1,
        }
        tree["optim"] = {**tree.get("optim", {}), **self._of_as_large_a_share(tree.get("optim", {}))}
        for table, key in (("run", "name"), ("run", "checkpoint_root"), ("data", "dir")):
            tree[table].pop(key, None)
        return tree

    def _of_as_large_a_share(self, optim: Mapping[str, Any]) -> dict[str, Any]:
        """Return what counts steps, so that it keeps its share of a run of fewer steps."""
        own: dict[str, Any] = {}
        if steps := optim.get("momentum_warmup_steps"):
            own["momentum_warmup_steps"] = max(1, round(steps * self.scale))
        if decay := optim.get("ema_decay"):
            own["ema_decay"] = round(float(decay) ** (1 / self.scale), 6)
        return own

    @cached_property
    def name(self) -> str:
        """Name of the run: its recipe, seed and scale, and an id of all that decides it."""
        made = canonical_json({"recipe": self.settings, "data": self.data.manifest_sha256, "scale": self.scale})
        digits = hashlib.sha256(made).hexdigest()[:ID_DIGITS]
        return f"{Path(self.wanted.recipe).stem}_s{self.seed}_x{self.scale:g}_{digits}"

    @cached_property
    def tables(self) -> dict[str, Any]:
        """The recipe as it is trained."""
        run = {**self.settings["run"], "name": self.name, "checkpoint_root": str(self.root)}
        return {**self.settings, "run": run, "data": {**self.settings["data"], "dir": str(self.data.path)}}

    @property
    def folder(self) -> Path:
        """Folder of the answer and of the seconds."""
        return self.root / self.name / FOLDER

    @cached_property
    def account(self) -> Account:
        """Seconds spent so far."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return Account(self.folder / ACCOUNT)

    def train(self) -> dict[str, Any]:
        """Train to the end of the seconds, from the last checkpoint where there is one."""
        if final := self._final():  # killed between the folder and the answer
            return trained(final)
        path = self.folder / "recipe.toml"
        with atomic_file(path) as building:
            building.write_text(as_toml(self.tables), encoding="utf-8")
        words = [str(path), "--json", "--no-ledger"]
        resumable = [c for c in self._saved() if (c.path / "training.safetensors").is_file()]
        if resumable:
            words += ["--resume", str(max(resumable, key=lambda c: int(c.meta["step"])).path)]
        if spent := self.account.spent("train"):
            words += ["--spent-seconds", repr(spent)]
        self.runner.run("trainer", words, self.account, "train", None)
        final = self._final()
        if final is None:
            raise PgolfError(f"training {self.name} ended without its final checkpoint")
        return trained(final)

    def _saved(self) -> list[Checkpoint]:
        """Return the run's checkpoints."""
        return [c for c in list_checkpoints(self.root) if c.path.parent.name == self.name]

    def _final(self) -> Checkpoint | None:
        """Return the run's final checkpoint, None before its end."""
        return next((c for c in self._saved() if c.meta["phase"] == "final"), None)


def trained(final: Checkpoint) -> dict[str, Any]:
    """Return the answer of training: the final checkpoint and what was seen."""
    facts = {"checkpoint": str(final.path), "steps": final.meta["step"], "tokens_seen": final.meta["tokens_seen"]}
    parameters = sum(tensor.numel() for tensor in final.load("raw").tensors.values())
    return {**facts, "clock_seconds": final.meta["train_seconds"], "parameters": parameters}
