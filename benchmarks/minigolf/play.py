"""A round from its TOML to its row: train, round, score, each stage once and each kill survived.

The answer of a stage is a JSON file in the run's folder; a stage that has one is not done again. Training goes on from
its last checkpoint with the seconds of all its lives on the clock, the other stages from what they have cached.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from benchmarks.minigolf.settings import (
    LEAST_WINDOWS,
    WINDOW_TOKENS,
    ProtocolSettings,
    Round,
    scaled_fit,
    scaled_tokens,
)
from benchmarks.minigolf.spending import Account
from pgolf_post.base.progress import say
from pgolf_post.base.storage import atomic_file, read_json, write_json
from pgolf_post.checkpoint import Checkpoint, list_checkpoints
from pgolf_post.data import DataFolder
from pgolf_post.errors import PgolfError, SettingsError
from pgolf_post.settings import apply_override, canonical_json, parse_settings
from pgolf_post.sweep.claims import claim
from pgolf_post.sweep.trainer_process import as_toml
from trainer.config import Recipe

ID_DIGITS = 12
FOLDER, ACCOUNT = "round", "processor_seconds.json"  # in the run's folder: answers of stages, seconds of stages
TRAINING, SCORING = ("train", "round"), ("score",)  # stages that a budget counts; protocols are of the second, too
METRIC_WINDOWS = 2  # of the trainer's own metric at the end of the run, which nobody reads


class Runner(Protocol):
    """Runs a stage: a child process, or in tests a call."""

    def run(self, module: str, words: Sequence[str], account: Account, stage: str, limit_seconds: float | None) -> str:
        """Run `python -m MODULE WORDS`, account for its seconds, return its standard output. Raises PgolfError."""


@dataclass(frozen=True)
class Game:
    """One round with one seed at one scale, in one folder."""

    wanted: Round
    recipe: Mapping[str, Any]  # tables
    place: Path  # folder of the round's file, which counted code is relative to
    data: DataFolder
    root: Path  # checkpoint root of all rounds
    seed: int
    scale: float
    runner: Runner

    def __post_init__(self) -> None:
        """Raise SettingsError for a scale outside (0, 1], or a recipe that cannot be trained so."""
        if not 0 < self.scale <= 1:
            raise SettingsError(
                f"--scale {self.scale:g}: the share of a whole round that is played, above 0, at most 1"
            )
        parse_settings(Recipe, self.tables, self.wanted.recipe)

    # ---- names and places --------------------------------------------------------------------------------------------

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Everything that decides the row."""
        settings = {"round": self.wanted.model_dump(mode="json"), "recipe": dict(self.recipe)}
        return {**settings, "data": self.data.manifest_sha256, "seed": self.seed, "scale": self.scale}

    @cached_property
    def id(self) -> str:
        """Id of the row, sha256 of what decides it."""
        return hashlib.sha256(canonical_json(self.identity)).hexdigest()

    @property
    def run_name(self) -> str:
        """Name of the training run, which all of the round lies under."""
        return f"{self.wanted.name}_s{self.seed}_x{self.scale:g}_{self.id[:ID_DIGITS]}"

    @property
    def folder(self) -> Path:
        """Folder of the stages' answers."""
        return self.root / self.run_name / FOLDER

    @cached_property
    def account(self) -> Account:
        """Seconds spent so far."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return Account(self.folder / ACCOUNT)

    @property
    def code(self) -> list[str]:
        """Counted code files."""
        return [str(self.place / path) for path in self.wanted.budget.code]

    @property
    def train_seconds(self) -> float:
        """Processor seconds of the training budget, the making of the artifact included."""
        return self.wanted.budget.train_seconds * self.scale

    @property
    def eval_seconds(self) -> float:
        """Processor seconds of the evaluation budget."""
        return self.wanted.budget.eval_seconds * self.scale

    @property
    def eval_tokens(self) -> int | None:
        """Validation tokens that are scored; None for all."""
        if self.scale == 1.0:
            return self.wanted.eval_tokens
        whole = self.wanted.eval_tokens or len(self.data.tokens("val"))
        return scaled_tokens(whole, self.scale)

    # ---- training ----------------------------------------------------------------------------------------------------

    @cached_property
    def tables(self) -> dict[str, Any]:
        """The recipe as it is trained: its clock counts processor seconds, and saves what a kill needs."""
        tree = json.loads(json.dumps(self.recipe))
        for change in self.wanted.set:
            apply_override(tree, change)
        rounding, data = self.wanted.rounding, tree.setdefault("data", {})
        kept = rounding.reserve_seconds * self.scale + rounding.fixed_seconds
        if kept >= self.train_seconds:
            raise SettingsError(
                f"round {self.wanted.name}: {kept:g} s are kept for rounding, of {self.train_seconds:g} s in all",
                hint="a larger --scale, or less in rounding.reserve_seconds and rounding.fixed_seconds",
            )
        data["dir"] = str(self.data.path)
        run = {"name": self.run_name, "checkpoint_root": str(self.root), "seed": self.seed}
        tree["run"] = {**tree.get("run", {}), **run, "threads": self.wanted.threads}
        schedule = {key: value for key, value in tree.get("schedule", {}).items() if key != "steps"}
        seconds = self.train_seconds - kept
        tree["schedule"] = {**schedule, "seconds": seconds, "clock": "processor", "reserve_seconds": 0.0}
        tree["checkpoint"] = {
            "phases": [],
            "every_seconds": min(self.wanted.save_seconds, seconds / 2),
            "keep_last": 1,
            "keep_optimizer_state": "last",
            "metric": "final",
            "metric_tokens": METRIC_WINDOWS * int(data.get("seq_len", WINDOW_TOKENS)) + 1,
        }
        if steps := tree.get("optim", {}).get("momentum_warmup_steps"):
            tree["optim"]["momentum_warmup_steps"] = max(1, round(steps * self.scale))
        return tree

    def train(self) -> dict[str, Any]:
        """Train to the end of the seconds, from the last checkpoint where there is one."""
        if final := self._final():  # killed between the folder and the answer
            return self._trained(final)
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
            raise PgolfError(f"training {self.run_name} ended without its final checkpoint")
        return self._trained(final)

    def _saved(self) -> list[Checkpoint]:
        """Return the run's checkpoints."""
        return [c for c in list_checkpoints(self.root) if c.path.parent.name == self.run_name]

    def _final(self) -> Checkpoint | None:
        """Return the run's final checkpoint, None before its end."""
        return next((c for c in self._saved() if c.meta["phase"] == "final"), None)

    def _trained(self, final: Checkpoint) -> dict[str, Any]:
        """Return the answer of training: the final checkpoint and what was seen."""
        facts = {"checkpoint": str(final.path), "steps": final.meta["step"], "tokens_seen": final.meta["tokens_seen"]}
        view = final.load(self.wanted.rounding.weights)
        parameters = sum(tensor.numel() for tensor in view.tensors.values())
        return {**facts, "clock_seconds": final.meta["train_seconds"], "parameters": parameters, "view_id": view.id}

    # ---- the other stages --------------------------------------------------------------------------------------------

    def work(self, stage: str, verb: str, task: Mapping[str, Any]) -> dict[str, Any]:
        """Do one of the stages of `work`."""
        path = self.folder / f"{stage}.task.json"
        with atomic_file(path) as building:
            write_json(building, {**task, "data": str(self.data.path), "threads": self.wanted.threads})
        words = [verb, str(path)]
        return last_json(self.runner.run("benchmarks.minigolf.work", words, self.account, stage, None))

    def round(self, trained: Mapping[str, Any]) -> dict[str, Any]:
        """Round the final checkpoint to the bytes."""
        rounding = self.wanted.rounding
        how = rounding.model_dump(mode="json", exclude={"reserve_seconds", "fixed_seconds", "fit"})
        how["calibration_tokens"] = scaled_tokens(rounding.calibration_tokens, self.scale)
        how["fit"] = scaled_fit(rounding.fit, self.scale).model_dump(mode="json")
        bytes_of = {"bytes": self.wanted.budget.bytes, "code": self.code}
        return self.work("round", "rounded", {**how, **bytes_of, "checkpoint": trained["checkpoint"]})

    def expected(self, trained: Mapping[str, Any], rounded: Mapping[str, Any]) -> dict[str, Any]:
        """Measure the expected gap on some windows."""
        windows = max(LEAST_WINDOWS, round(self.wanted.expected_windows * self.scale))
        made = {"checkpoint": trained["checkpoint"], "artifact": rounded["artifact"]}
        text = {"eval_tokens": self.eval_tokens, "windows": windows, "seq_len": self.seq_len}
        return self.work("expected", "expected", {**made, **text, "weights": self.wanted.rounding.weights})

    @property
    def seq_len(self) -> int:
        """Tokens of a scored window."""
        return int(self.tables["data"].get("seq_len", WINDOW_TOKENS))

    def score(self, stage: str, path: str, limit: float | None, how: ProtocolSettings | None = None) -> dict[str, Any]:
        """Score a checkpoint or an artifact by plain windows or a protocol."""
        words = ["eval", path, "--data", str(self.data.path), "--seq-len", str(self.seq_len), "--json"]
        words += ["--threads", str(self.wanted.threads), *(how.words if how else [])]
        if self.eval_tokens is not None:
            words += ["--max-tokens", str(self.eval_tokens)]
        if stage == "reference":
            words += ["--weights", self.wanted.rounding.weights]
        answer = last_json(self.runner.run("pgolf_post", words, self.account, stage, limit))
        return {key: answer[key] for key in ("bpb", "nats", "tokens", "bytes", "documents", "path")}

    def eval_left(self) -> float:
        """Return what is left of the evaluation's seconds."""
        return max(0.0, self.eval_seconds - self.account.spent(*self.scoring_stages))

    @property
    def scoring_stages(self) -> tuple[str, ...]:
        """Stages that the evaluation budget counts."""
        return (*SCORING, *(f"protocol {how.name}" for how in self.wanted.protocols))


def last_json(out: str) -> dict[str, Any]:
    """Return the JSON object in the last line of a stage's output."""
    answer: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
    return answer


def once(game: Game, stage: str, do: Any, *given: Any) -> dict[str, Any]:
    """Return a stage's answer from disk, or do the stage and keep it."""
    path = game.folder / f"{stage.replace('/', '-')}.json"
    if path.is_file():
        return read_json(path)
    say(f"{game.run_name}: {stage}")
    answer: dict[str, Any] = do(*given)
    with atomic_file(path) as building:
        write_json(building, answer)
    return answer


def play(game: Game) -> dict[str, Any]:
    """Play a round to its end, from where it stands. Returns the answers of all stages.

    Raises OverBudgetError's exit code with the stage's words where the artifact is too large, SpentError where scoring
    exceeds its seconds, PgolfError where another process plays the same round or a stage fails.
    """
    with claim(game.folder, "claim", inherit=True) as ours:
        if not ours:
            raise PgolfError(f"another process plays {game.run_name}", hint="wait for it, or choose another --out")
        trained = once(game, "train", game.train)
        rounded = once(game, "round", game.round, trained)
        score = once(game, "score", game.score, "score", rounded["artifact"], game.eval_left())
        protocols = {}
        for how in game.wanted.protocols:
            stage = f"protocol {how.name}"
            protocols[how.name] = once(game, stage, game.score, stage, rounded["artifact"], game.eval_left(), how)
        reference = once(game, "reference", game.score, "reference", trained["checkpoint"], None)
        expected = once(game, "expected", game.expected, trained, rounded)
    answers = {"train": trained, "round": rounded, "score": score, "protocols": protocols}
    return {**answers, "reference": reference, "expected": expected}
