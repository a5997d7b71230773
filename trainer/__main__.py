"""`python -m trainer RECIPE.toml [--set KEY=VALUE …] [--dry-run] …`: train one run, or plan it.

Under `torchrun --standalone --nproc_per_node=8 -m trainer RECIPE.toml` the same run is shared by eight processes.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pgolf_post.base.command_line import run_command
from pgolf_post.base.numbers import FiniteFloat
from pgolf_post.base.progress import print_json, say
from pgolf_post.base.rank_variables import place_of_process
from pgolf_post.errors import SettingsError
from trainer.schedule.clock import ScheduleClock

if TYPE_CHECKING:
    from trainer.config import Recipe
    from trainer.plan.costs import Wanted

POSITIVE = FiniteFloat(min=0, min_open=True)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("recipe_path", metavar="RECIPE.toml", type=click.Path(path_type=Path))
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a key of the recipe, for example optim.matrix_lr=0.02. Repeatable.",
)
@click.option(
    "--resume",
    type=click.Path(path_type=Path),
    metavar="CHECKPOINT",
    help="Continue from this checkpoint folder, which must hold optimizer state, with the recipe it was trained with.",
)
@click.option(
    "--init-from",
    type=click.Path(path_type=Path),
    metavar="CHECKPOINT",
    help="Start from this checkpoint's weights, by a rule for each tensor: --set init.checkpoint=CHECKPOINT.",
)
@click.option(
    "--spent-seconds",
    type=POSITIVE,
    metavar="SECONDS",
    help="Count this many of schedule.seconds as spent by earlier processes of the run, where that is more than the "
    "checkpoint of --resume knows: what a kill lost is counted.",
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Show the run's timeline, its disk space and its findings. Train nothing, and exit 2 if a setting cannot act.",
)
@click.option(
    "--step-seconds",
    type=POSITIVE,
    metavar="SECONDS",
    help="With --dry-run, take this many seconds for a step without loops instead of measuring four steps.",
)
@click.option(
    "--looped-step-seconds",
    type=POSITIVE,
    metavar="SECONDS",
    help="With --step-seconds, take this many seconds for a step with all loops on; by default the time grows with "
    "the number of block visits.",
)
@click.option(
    "--plan", metavar="PLAN", help="With --dry-run, predict the artifact under a preset, a TOML file, or fit."
)
@click.option(
    "--code",
    multiple=True,
    type=click.Path(path_type=Path),
    help="With --plan, a counted code file or folder. Repeatable.",
)
@click.option(
    "--budget",
    type=click.IntRange(min=0),
    metavar="BYTES",
    help="With --plan, of code and artifact.  [default: 16000000]",
)
@click.option("--dollars-per-hour", type=POSITIVE, help="With --dry-run, price the run.")
@click.option(
    "--smoke",
    is_flag=True,
    help="Train 30 steps and take the result through every later stage, to a draft record folder; about two minutes.",
)
@click.option(
    "--smoke-passed",
    is_flag=True,
    help="Say whether this recipe has passed its smoke ladder here. Train nothing, and exit 4 if it has not.",
)
@click.option(
    "--no-ledger",
    is_flag=True,
    help="Leave the ledger alone: who started this run, as a sweep does, writes its rows.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object as the last line of standard output.")
def command(
    recipe_path: Path,
    overrides: tuple[str, ...],
    resume: Path | None,
    init_from: Path | None,
    spent_seconds: float | None,
    dry_run: bool,
    step_seconds: float | None,
    looped_step_seconds: float | None,
    plan: str | None,
    code: tuple[Path, ...],
    budget: int | None,
    dollars_per_hour: float | None,
    smoke: bool,
    smoke_passed: bool,
    no_ledger: bool,
    as_json: bool,
) -> None:
    """Train the run that RECIPE.toml describes. Its checkpoints appear in the folder run.checkpoint_root/run.name.

    Under torchrun, all processes share the run. Exit codes: 0 fine, 1 failed, 2 usage or a setting that cannot act,
    5 stopped early (the recipe's table `stop`, or run.grad_norm_stop).
    """
    clock = ScheduleClock()  # what follows is counted: imports too
    from pgolf_post.settings import read_settings
    from trainer.config import Recipe

    if init_from is not None:
        if resume:
            raise click.UsageError(
                "--resume goes on with a run's own weights, --init-from starts another run; give one"
            )
        if any(override.partition("=")[0].strip() == "init.checkpoint" for override in overrides):
            raise click.UsageError("--init-from and --set init.checkpoint are two ways of saying which; give one")
        overrides = (*overrides, f"init.checkpoint={json.dumps(str(init_from), ensure_ascii=False)}")
    if resume and dry_run:
        raise click.UsageError("--dry-run shows a whole run; leave --resume out")
    if spent_seconds and (dry_run or smoke or smoke_passed):
        raise click.UsageError("--spent-seconds is for training; leave --dry-run and --smoke out")
    if step_seconds is None and looped_step_seconds is not None:
        raise click.UsageError("--looped-step-seconds needs --step-seconds")
    if step_seconds is not None and not dry_run:
        raise click.UsageError("--step-seconds is the time that --dry-run reckons with; add --dry-run")
    if not dry_run and (plan or code or budget is not None or dollars_per_hour):
        raise click.UsageError("--plan, --code, --budget and --dollars-per-hour are for --dry-run; add it")
    if plan is None and (code or budget is not None):
        raise click.UsageError("--code and --budget need --plan")
    if (smoke or smoke_passed) and (resume or dry_run):
        raise click.UsageError("--smoke climbs a ladder of its own; leave --resume and --dry-run out")
    recipe = read_settings(recipe_path, Recipe, overrides)
    require_base(recipe)
    if spent_seconds and recipe.schedule.seconds is None:
        raise SettingsError(
            f"--spent-seconds {spent_seconds:g} counts seconds of schedule.seconds, which the recipe does not set",
            hint="leave --spent-seconds out, or set schedule.seconds",
        )
    if smoke:
        climb(recipe, as_json)
        return
    if smoke_passed:
        ask(recipe, str(recipe_path), as_json)
        return
    if dry_run:
        if place_of_process().world_size > 1:
            raise SettingsError("--dry-run is for one process; start it without torchrun")
        from trainer.plan.costs import BUDGET_BYTES, Wanted

        wanted = Wanted(plan, code, BUDGET_BYTES if budget is None else budget, dollars_per_hour)
        foresee(recipe, str(recipe_path), step_seconds, looped_step_seconds, wanted, as_json)
    else:
        sets = [word for override in overrides for word in ("--set", override)]
        train(recipe, resume, as_json, [str(recipe_path), *sets], not no_ledger, clock, spent_seconds or 0.0)


def require_base(recipe: Recipe) -> None:
    """Raise NotFoundError if the run that a recipe names as its base is neither on disk nor in the ledger."""
    from pgolf_post.errors import NotFoundError
    from pgolf_post.ledger import LEDGER_FILE, Ledger
    from pgolf_post.ledger.disk import run_row_id

    base, root = recipe.run.base, recipe.run.checkpoint_root
    if base is None or (root / base).is_dir():
        return
    if (root / LEDGER_FILE).is_file():
        with Ledger.open(root, read_only=True) as ledger:
            if ledger.get("run", run_row_id(base)) is not None:
                return
    raise NotFoundError(
        f"run.base = {base!r}: no such run under {root} or in its ledger",
        hint=f"pgolf-post ledger table --root {root} --kind run",
    )


def climb(recipe: Recipe, as_json: bool) -> None:
    """Climb a recipe's smoke ladder."""
    from trainer.smoke import smoke

    if place_of_process().world_size > 1:
        raise SettingsError("--smoke is for one process; start it without torchrun")
    rows = smoke(recipe)
    if as_json:
        print_json({"recipe": recipe.run.name, "rungs": rows})


def ask(recipe: Recipe, source: str, as_json: bool) -> None:
    """Say that a recipe has passed its smoke ladder. Raises VerificationError if it has not."""
    from trainer.smoke import require_passed, smoke_path

    require_passed(recipe, shlex.join(["python", "-m", "trainer", source, "--smoke"]))
    say(f"{recipe.run.name} has passed: {smoke_path(recipe)}")
    if as_json:
        print_json({"recipe": recipe.run.name, "passed": True})


def train(
    recipe: Recipe,
    resume: Path | None,
    as_json: bool,
    words: list[str],
    recorded: bool = True,
    clock: ScheduleClock | None = None,
    spent_seconds: float = 0.0,
) -> None:
    """Train a recipe to its end, and record its checkpoints in the ledger; `words` are the command's own arguments."""
    from pgolf_post.checkpoint import Checkpoint, run_checkpoints
    from pgolf_post.ledger.recording import record
    from trainer.run.loop import StoppedRun, Trainer, WorseRun
    from trainer.start.init_from import show_start
    from trainer.step.distributed import TrainingRanks

    ranks = TrainingRanks.join()
    try:
        trainer = Trainer(recipe, ranks, resume is not None, clock)
        if resume:
            trainer.resume(resume)
        elif trainer.start is not None and ranks.is_main:
            show_start(trainer.start)
        trainer.state.count_spent(spent_seconds)
        state, device = trainer.state, str(ranks.device)
        where = f"{ranks.world_size} × {device}" if ranks.world_size > 1 else device
        compiled = "compiled" if trainer.gradients.compiled else "not compiled"
        say(
            f"{trainer.num_parameters():,} parameters on {where}, {state.data.name}, {state.autocast or 'fp32'}, "
            f"attention {trainer.model.attention_backend.name}, {compiled}"
        )
        checkpoint = trainer.run()
    except StoppedRun as stopped:
        say_how_to_go_on(recipe, stopped.path, words, ranks.world_size)
        raise
    except WorseRun as worse:
        if ranks.is_main:
            ended = Checkpoint.open(worse.path)
            if recorded:
                record(*(saved.path for saved in run_checkpoints(ended)))
            if as_json:
                named = {"checkpoint": str(ended.path), "checkpoint_id": ended.meta["id"]}
                print_json({**named, "stopped_early": ended.meta["stopped_early"]})
        raise
    finally:
        ranks.leave()
    if ranks.is_main and recorded:
        record(*(saved.path for saved in run_checkpoints(checkpoint)))
    if as_json and ranks.is_main:
        views = {name: view["metric"] for name, view in checkpoint.meta["views"].items()}
        print_json(
            {
                "checkpoint": str(checkpoint.path),
                "checkpoint_id": checkpoint.meta["id"],
                "views": views,
                "ledger": state.phase_times.as_facts(recipe.schedule.wall_seconds),
            }
        )


def say_how_to_go_on(recipe: Recipe, path: Path, words: list[str], world_size: int) -> None:
    """Print the command that continues a stopped run, if what it saved can be continued."""
    if not recipe.checkpoint.optimizer_state:
        say(f"{path} has no optimizer state (checkpoint.optimizer_state = false): the run cannot go on from it")
        return
    program = ["torchrun", "--standalone", f"--nproc_per_node={world_size}"] if world_size > 1 else ["python"]
    say(f"go on: {shlex.join([*program, '-m', 'trainer', *words, '--resume', str(path)])}")


def foresee(
    recipe: Recipe,
    source: str,
    step_seconds: float | None,
    looped_step_seconds: float | None,
    wanted: Wanted,
    as_json: bool,
) -> None:
    """Predict a recipe's timeline and costs, and show them. Raises SettingsError if a check refuses the recipe."""
    from trainer.plan import dry_run
    from trainer.schedule.step_times import StepTimes

    if step_seconds is None:
        times, reserve = dry_run.measure_times(recipe)
    else:
        times, reserve = StepTimes.given(recipe.model, step_seconds, looped_step_seconds), None
    found = dry_run.dry_run(recipe, times, reserve, wanted)
    if as_json:
        print_json(dry_run.answer(found))
    dry_run.require_no_refusal(found.findings, source)


def main() -> None:
    """Run the command as a process: a foreseen failure is one line and an exit code."""
    run_command(command)


if __name__ == "__main__":
    main()
