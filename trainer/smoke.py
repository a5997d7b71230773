"""A smoke ladder: every stage of the way to a record folder, each on as little as it takes to fail.

A fault that only shows after training costs a training run. So the recipe itself is trained for 30 steps, and what
comes of it goes through statistics, quantization, the first build of a fit, scoring and a draft of the record folder. A
rung that fails ends the ladder, with its error. What passed, or failed, is kept in RUN/smoke.json under the recipe's
sha256, so that a dear run can ask whether its recipe has been tried (`sweep run` on several GPUs does). Smoke runs live
under a root of their own, ROOT/smoke, where no command takes them for the newest run.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pgolf_post.artifacts import requant
from pgolf_post.base.progress import print_table, say
from pgolf_post.base.storage import atomic_file, read_json, write_json
from pgolf_post.calibrate import CalibrationSettings, calibrate
from pgolf_post.checkpoint import SMOKE_FOLDER
from pgolf_post.data import DataFolder
from pgolf_post.errors import VerificationError
from pgolf_post.fit.prepare import prepare
from pgolf_post.fit.settings import FitSettings
from pgolf_post.fit.solve import Search
from pgolf_post.ledger.recording import record
from pgolf_post.pack.report.size import BUDGET_BYTES
from pgolf_post.plan import read_plan
from pgolf_post.score.plain import PlainProtocol
from pgolf_post.score.stage import score
from pgolf_post.settings import canonical_json
from pgolf_post.submit.stage import Order, submit
from trainer.config import Recipe
from trainer.run.loop import Trainer
from trainer.run.stopping import StopSettings

STEPS = 30
WINDOWS = 64  # that are scored
CALIBRATION_WINDOWS = 8
DRAFT_WINDOWS = 8  # of which the draft's script is proved
PLAN = "sdclip-1394"
SMOKE_FILE = "smoke.json"
HEADER = ("rung", "seconds", "result")


def short_recipe(recipe: Recipe) -> Recipe:
    """Return the recipe for a few steps, under a root of its own; architecture, data and optimizer are untouched."""
    steps = min(STEPS, recipe.schedule.steps or STEPS)
    schedule = recipe.schedule.model_copy(
        update={"steps": steps, "seconds": None, "clock": "wall", "reserve_seconds": "auto", "hessian_seconds": None}
    )
    kept = {"metric": "final", "metric_tokens": WINDOWS * recipe.longest_seq_len + 1, "every_steps": None}
    checkpoint = recipe.checkpoint.model_copy(
        update={**kept, "every_seconds": None, "keep_last": None, "fractions": ()}
    )
    root = recipe.run.checkpoint_root / SMOKE_FOLDER
    run = recipe.run.model_copy(update={"checkpoint_root": root, "min_tokens_per_second": None})
    return Recipe.model_validate(
        recipe.model_copy(
            update={"schedule": schedule, "checkpoint": checkpoint, "run": run, "stop": StopSettings()}
        ).model_dump()
    )


def recipe_sha256(recipe: Recipe) -> str:
    """Return the hash of what a smoke run tries: the recipe without its name, place and seed."""
    tree = recipe.model_dump(mode="json")
    tree["run"] = {key: value for key, value in tree["run"].items() if key not in ("name", "checkpoint_root", "seed")}
    return hashlib.sha256(canonical_json(tree)).hexdigest()


@dataclass
class Ladder:
    """The rungs of one recipe, each with what the earlier ones made."""

    recipe: Recipe
    made: dict[str, Any] = field(default_factory=dict)  # of earlier rungs: view, data, stats, artifact
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def calibration(self) -> CalibrationSettings:
        """Settings of the statistics: a few windows."""
        return CalibrationSettings(tokens=CALIBRATION_WINDOWS * self.recipe.longest_seq_len)

    def rungs(self) -> dict[str, Callable[[], str]]:
        """Return the rungs in order, by name: functions that return what they have to show."""
        return {
            "train": self.train,
            "statistics": self.statistics,
            "requant": self.requantize,
            "fit": self.first_build,
            "score": self.score,
            "submit": self.draft,
        }

    def climb(self) -> None:
        """Take every rung, and keep what passed or failed. Raises what a rung raises."""
        try:
            for name, rung in self.rungs().items():
                self._take(name, rung)
        finally:
            with atomic_file(smoke_path(self.recipe)) as building:
                write_json(building, {"recipe_sha256": recipe_sha256(self.recipe), "rungs": self.rows})

    def _take(self, name: str, rung: Callable[[], str]) -> None:
        """Take one rung. Whatever it raises, foreseen or not, is in its row."""
        started, outcome = time.perf_counter(), "failed"
        row: dict[str, Any] = {"rung": name, "passed": False}
        self.rows.append(row)
        try:
            row |= {"result": rung(), "passed": True}
            outcome = "passed"
        except BaseException as error:
            row["result"] = f"{type(error).__name__}: {error}"
            raise
        finally:
            row["seconds"] = round(time.perf_counter() - started, 3)
            say(f"smoke: {name} {outcome} after {row['seconds']:.1f} s")

    def train(self) -> str:
        short = short_recipe(self.recipe)
        shutil.rmtree(short.run.folder, ignore_errors=True)  # an earlier smoke run's
        checkpoint = Trainer(short).run()
        record(checkpoint.path)
        self.made |= {"view": checkpoint.load(), "data": DataFolder.open(short.data.dir)}
        return f"{short.schedule.steps} steps, {checkpoint.path}"

    def statistics(self) -> str:
        with_fisher = self.calibration.model_copy(update={"fisher": True})
        self.made["stats"] = calibrate(self.made["view"], self.made["data"], with_fisher)
        return f"{self.made['stats'].num_tokens:,} tokens"

    def requantize(self) -> str:
        self.made["artifact"] = requant(self.made["view"], self.made["stats"], read_plan(PLAN))
        return f"{self.made['artifact'].num_bytes:,} bytes by {PLAN}"

    def first_build(self) -> str:
        """Build once, as `fit` begins its search, at the bytes that requant took."""
        made, settings = self.made, FitSettings(kappa="off")
        fitter = prepare(made["view"], made["data"], self.calibration, settings, stats=made["stats"])
        search = Search(fitter.builder, fitter.kappa)
        constant = search.first_constant(made["artifact"].num_bytes)
        model = fitter.builder.model(fitter.builder.quantize(search.constants(constant)))
        return f"{search.packed_bytes(model):,} bytes at c = {constant:.3e}"

    def score(self) -> str:
        seq_len = self.recipe.longest_seq_len
        protocol = PlainProtocol(seq_len=seq_len, max_tokens=WINDOWS * seq_len + 1)
        return f"{score(self.made['artifact'], self.made['data'], protocol).bpb:.4f} bpb on {WINDOWS} windows"

    def draft(self) -> str:
        """Make a draft folder, whose script is run alone; it is removed again."""
        seq_len, out = self.recipe.longest_seq_len, self.made["view"].checkpoint.path.parent / "draft"
        protocol = PlainProtocol(seq_len=seq_len, max_tokens=DRAFT_WINDOWS * seq_len + 1)
        shutil.rmtree(out, ignore_errors=True)
        order = Order("smoke", protocol, out, draft=True, budget=max(BUDGET_BYTES, 1 << 30), skip_audit=True)
        made = submit([self.made["artifact"].path], self.made["data"], order)
        shutil.rmtree(out, ignore_errors=True)
        return f"{made.facts['bytes_code']:,} bytes of code, run alone: the same nats"


def smoke_path(recipe: Recipe) -> Path:
    """Return the file that keeps what passed, beside the smoke run's checkpoints."""
    return recipe.run.checkpoint_root / SMOKE_FOLDER / recipe.run.name / SMOKE_FILE


def has_passed(recipe: Recipe) -> bool:
    """Return whether this very recipe (whatever its seed and name's place) has passed its smoke ladder here."""
    path = smoke_path(recipe)
    if not path.is_file():
        return False
    kept = read_json(path)
    return kept.get("recipe_sha256") == recipe_sha256(recipe) and all(rung["passed"] for rung in kept["rungs"])


def require_passed(recipe: Recipe, command: str) -> None:
    """Raise VerificationError, naming `command` as the next, unless the recipe has passed its smoke ladder."""
    if not has_passed(recipe):
        raise VerificationError(
            f"{recipe.run.name}: this recipe has not passed its smoke ladder here ({smoke_path(recipe)})", hint=command
        )


def smoke(recipe: Recipe) -> list[dict[str, Any]]:
    """Climb the ladder and show it. Returns the rungs. Raises what a rung raises, the table shown."""
    ladder = Ladder(recipe)
    try:
        ladder.climb()
    finally:
        rows = [(row["rung"], f"{row.get('seconds', 0.0):.1f}", str(row["result"])[:100]) for row in ladder.rows]
        print_table(f"smoke: {recipe.run.name}", HEADER, rows)
    return ladder.rows
