"""A round from its TOML to its row: train, round, score, each stage once and each kill survived.

The answer of a stage is a JSON file in the round's folder; a stage that has one is not done again. Training is a run
that rounds share (`training.py`), the other stages go on from what they have cached.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.minigolf.settings import (
    LEAST_WINDOWS,
    WINDOW_TOKENS,
    ProtocolSettings,
    Round,
    scaled_fit,
    scaled_tokens,
)
from benchmarks.minigolf.spending import Account, Runner
from benchmarks.minigolf.text import ScoredText, scored_text
from benchmarks.minigolf.training import ACCOUNT, ID_DIGITS, Training
from pgolf_post.base.progress import say
from pgolf_post.base.storage import atomic_file, read_json, write_json
from pgolf_post.data import DataFolder
from pgolf_post.errors import PgolfError, SettingsError
from pgolf_post.pack.report.size import count_code
from pgolf_post.plan import read_plan
from pgolf_post.settings import canonical_json
from pgolf_post.sweep.claims import claim

TRAINING, SCORING = ("train", "round"), ("score",)  # stages that a budget counts; protocols are of the second, too


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
        _ = self.training

    # ---- names and places --------------------------------------------------------------------------------------------

    @cached_property
    def training(self) -> Training:
        """The run, which other rounds may share."""
        return Training(self.wanted, self.recipe, self.data, self.root, self.seed, self.scale, self.runner)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Everything that decides the row."""
        wanted, rounding = self.wanted.model_dump(mode="json"), self.wanted.rounding
        plan = read_plan(rounding.plan, rounding.set).model_dump(mode="json") if rounding.plan else None
        settings = {"round": wanted, "recipe": dict(self.recipe), "plan": plan, "code_bytes": count_code(self.code)}
        return {**settings, "data": self.data.manifest_sha256, "seed": self.seed, "scale": self.scale}

    @cached_property
    def id(self) -> str:
        """Id of the row, sha256 of what decides it."""
        return hashlib.sha256(canonical_json(self.identity)).hexdigest()

    @property
    def name(self) -> str:
        """Name of the round's folder, and of what it says."""
        return f"{self.wanted.name}_{self.id[:ID_DIGITS]}"

    @property
    def folder(self) -> Path:
        """Folder of the stages' answers, in that of the run."""
        return self.root / self.training.name / self.name

    @cached_property
    def account(self) -> Account:
        """Seconds spent so far on all stages but the training."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return Account(self.folder / ACCOUNT)

    @property
    def lives(self) -> dict[str, list[float]]:
        """Processor seconds of every stage, by life."""
        return {**self.training.account.lives, **self.account.lives}

    @property
    def code(self) -> list[Path]:
        """Counted code files."""
        return [self.place / path for path in self.wanted.budget.code]

    @property
    def eval_seconds(self) -> float:
        """Processor seconds of the evaluation budget."""
        return self.wanted.budget.eval_seconds * self.scale

    @cached_property
    def text(self) -> ScoredText:
        """The validation text that is scored."""
        return scored_text(self.data, self.scale)

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
        bytes_of = {"bytes": self.wanted.budget.bytes, "code": [str(path) for path in self.code]}
        return self.work("round", "rounded", {**how, **bytes_of, "checkpoint": trained["checkpoint"]})

    def expected(self, trained: Mapping[str, Any], rounded: Mapping[str, Any]) -> dict[str, Any]:
        """Measure the expected gap on some windows."""
        windows = max(LEAST_WINDOWS, round(self.wanted.expected_windows * self.scale))
        made = {"checkpoint": trained["checkpoint"], "artifact": rounded["artifact"]}
        text = {"eval_tokens": self.text.tokens, "windows": windows, "seq_len": WINDOW_TOKENS}
        return self.work("expected", "expected", {**made, **text, "weights": self.wanted.rounding.weights})

    def score(self, stage: str, path: str, limit: float | None, how: ProtocolSettings | None = None) -> dict[str, Any]:
        """Score a checkpoint or an artifact by plain windows or a protocol."""
        words = ["eval", path, "--data", str(self.data.path), "--seq-len", str(WINDOW_TOKENS), "--json"]
        words += ["--threads", str(self.wanted.threads), *(how.words if how else [])]
        words += ["--max-tokens", str(self.text.tokens)]
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


def once(folder: Path, stage: str, do: Any, *given: Any) -> dict[str, Any]:
    """Return a stage's answer from its folder, or do the stage and keep it there."""
    path = folder / f"{stage.replace('/', '-')}.json"
    if path.is_file():
        return read_json(path)
    say(f"{folder.parent.name}, {folder.name}: {stage}")
    answer: dict[str, Any] = do(*given)
    with atomic_file(path) as building:
        write_json(building, answer)
    return answer


@contextmanager
def alone(folder: Path, what: str) -> Iterator[None]:
    """Hold a folder for the length of the block. Raises PgolfError where another process has it."""
    with claim(folder, "claim", inherit=True) as ours:
        if not ours:
            raise PgolfError(f"another process plays {what}", hint="wait for it, or choose another --out")
        yield


def play(game: Game) -> dict[str, Any]:
    """Play a round to its end, from where it stands. Returns the answers of all stages.

    Raises OverBudgetError's exit code with the stage's words where the artifact is too large, SpentError where scoring
    exceeds its seconds, PgolfError where another process plays the same round, or trains for one, or a stage fails.
    """
    with alone(game.training.folder, game.training.name):
        trained = once(game.training.folder, "train", game.training.train)
    with alone(game.folder, game.name):
        rounded = once(game.folder, "round", game.round, trained)
        score = once(game.folder, "score", game.score, "score", rounded["artifact"], game.eval_left())
        protocols = {}
        for how in game.wanted.protocols:
            stage = f"protocol {how.name}"
            protocols[how.name] = once(
                game.folder, stage, game.score, stage, rounded["artifact"], game.eval_left(), how
            )
        reference = once(game.folder, "reference", game.score, "reference", trained["checkpoint"], None)
        expected = once(game.folder, "expected", game.expected, trained, rounded)
    answers = {"train": trained, "round": rounded, "score": score, "protocols": protocols}
    return {**answers, "reference": reference, "expected": expected}
