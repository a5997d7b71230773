"""`pgolf-post sweep plan|run|table|watch`: a question as a file, its trials, and what came of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from pgolf_post.base.numbers import FiniteFloat
from pgolf_post.base.progress import print_json, say
from pgolf_post.cli.common import (
    data_option,
    derived_folder,
    derived_option,
    dollars_option,
    json_option,
    quiet_option,
    threads_option,
)

if TYPE_CHECKING:
    from pgolf_post.ledger import Row
    from pgolf_post.sweep.run import Options
    from pgolf_post.sweep.state import State

F = TypeVar("F", bound=Callable[..., Any])
POSITIVE = FiniteFloat(min=0, min_open=True)


@click.group("sweep")
def command() -> None:
    """Run the trials that SPEC.toml describes; every one becomes a row of the ledger under checkpoints/.

    \b
    pgolf-post sweep plan  sweeps/hessian_sdclip_lambda.toml     what would be done, before any work
    pgolf-post sweep run   sweeps/hessian_sdclip_lambda.toml     do it; kill it, and run it again to go on
    pgolf-post sweep table sweeps/hessian_sdclip_lambda.toml     what came of it, ranked, also as files
    pgolf-post sweep watch sweeps/hessian_sdclip_lambda.toml     the same table while it runs elsewhere

    SPEC is read again before every trial: what is added to the file while the sweep runs is run too.
    """


def sweep_options(function: F) -> F:
    """Add what every subcommand reads."""
    options = (
        click.argument("spec", type=click.Path(path_type=Path)),
        click.option(
            "--checkpoint",
            type=click.Path(path_type=Path),
            help="Checkpoint folder of specs that name none.  [default: the newest final one]",
        ),
        data_option,
        derived_option,
        click.option(
            "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a key of the spec. Repeatable."
        ),
        click.option(
            "--root",
            default="checkpoints",
            show_default=True,
            type=click.Path(path_type=Path),
            help="Folder that holds the ledger.",
        ),
        click.option(
            "--results",
            default="sweeps/results",
            show_default=True,
            type=click.Path(path_type=Path),
            help="Folder for tables, figures and locks.",
        ),
    )
    for option in reversed(options):
        function = option(function)
    return function


def chosen_options(options: dict[str, Any], **more: Any) -> Options:
    """Return the options of a sweep from those of the command."""
    from pgolf_post.sweep.places import Places
    from pgolf_post.sweep.run import Options

    places = Places(options["checkpoint"], options["data_dir"], options["root"], options["results"], derived_folder())
    return Options(options["spec"], tuple(options["overrides"]), places, **more)


def seconds_of_budget(seconds: float | None, dollars: float | None, dollars_per_hour: float | None) -> float | None:
    """Return the smaller of both limits in seconds; None without one. Raises UsageError for dollars without a price."""
    if dollars is not None and dollars_per_hour is None:
        raise click.UsageError("--max-dollars needs --dollars-per-hour, which turns them into seconds")
    limits = [seconds, None if dollars is None else dollars / float(dollars_per_hour or 1) * 3600]
    return min((limit for limit in limits if limit is not None), default=None)


@command.command("plan")
@sweep_options
@click.option("--measure", is_flag=True, help="Time four steps of each training whose step time no earlier run tells.")
@dollars_option
@threads_option
@quiet_option
@json_option
def plan_command(measure: bool, dollars_per_hour: float | None, as_json: bool, **options: Any) -> None:
    """List the trials of SPEC: what is there already, bytes, seconds and peak memory, before any work."""
    from pgolf_post.sweep.plan import plan_rows, show_plan
    from pgolf_post.sweep.run import Sweep

    sweep = Sweep(chosen_options(options))
    try:
        rows, state = plan_rows(sweep, measure), sweep.state()
    finally:
        sweep.close()
    seconds = show_plan(rows, state, options["spec"].stem, dollars_per_hour)
    if as_json:
        told = {"question": state.spec.question, "trials": [row.facts() for row in rows], "seconds": seconds}
        print_json({**told, "dollars": None if dollars_per_hour is None else seconds / 3600 * dollars_per_hour})


@command.command("run")
@sweep_options
@click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="Run the trials by processes of this machine, or by Ray.",
)
@click.option(
    "--workers", type=click.IntRange(min=1), default=1, show_default=True, help="Number of processes, one per device."
)
@click.option(
    "--compile/--no-compile",
    "compiled",
    default=None,
    help="Compile the model with torch.compile.  [default: on a GPU]",
)
@click.option("--retry-failed", is_flag=True, help="Run trials again whose row is an error.")
@dollars_option
@click.option(
    "--max-seconds",
    type=POSITIVE,
    help="Begin no trial that does not fit, and stop a training, once all trials have taken so long together.",
)
@click.option("--max-dollars", type=POSITIVE, help="The same in dollars; needs --dollars-per-hour.")
@click.option(
    "--ray-address", help="With ray, a running cluster, such as auto or ray://HOST:10001.  [default: a local Ray]"
)
@click.option("--cpus-per-trial", type=POSITIVE, default=1.0, show_default=True, help="With ray, CPUs per trial.")
@click.option(
    "--gpus-per-trial", type=FiniteFloat(min=0), default=0.0, show_default=True, help="With ray, GPUs per trial."
)
@click.option(
    "--retries",
    type=click.IntRange(min=0),
    default=2,
    show_default=True,
    help="With ray, how often a dead worker's trial is tried again.",
)
@click.option(
    "--smoke/--no-smoke",
    default=None,
    help="Before trials train, ask whether their recipes have passed `python -m trainer RECIPE --smoke` here.  "
    "[default: on several GPUs]",
)
@click.option("--plots/--no-plots", default=False, help="Draw figures beside the table (extra `plots`).")
@threads_option
@quiet_option
@json_option
def run_command(
    engine: str,
    workers: int,
    compiled: bool | None,
    retry_failed: bool,
    dollars_per_hour: float | None,
    max_seconds: float | None,
    max_dollars: float | None,
    ray_address: str | None,
    cpus_per_trial: float,
    gpus_per_trial: float,
    retries: int,
    smoke: bool | None,
    plots: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Run the trials of SPEC that have no row yet, best first in the closing table.

    \b
    pgolf-post sweep run sweeps/sdclip_k.toml --checkpoint checkpoints/RUN/step_…
    pgolf-post sweep run SPEC --workers 8                                    one process per GPU
    torchrun --standalone --nproc_per_node=8 -m pgolf_post sweep run SPEC    the same under torchrun
    pgolf-post sweep run SPEC --engine ray --ray-address auto --gpus-per-trial 1

    A trial that fails is a row with its error, and the others go on. Exit code 4 if the control does not reproduce
    what the spec's gate says, or a recipe to train has not passed its smoke ladder.
    """
    from pgolf_post.base.ranks import Ranks
    from pgolf_post.ledger.schema import iso_utc
    from pgolf_post.sweep.engines.local import run_local
    from pgolf_post.sweep.engines.torchrun import run_torchrun
    from pgolf_post.sweep.smoke import num_gpus, require_smoke
    from pgolf_post.sweep.table import live

    started, spent = time.perf_counter(), list[float]()
    limit = seconds_of_budget(max_seconds, max_dollars, dollars_per_hour)
    more = {"compiled": compiled, "dollars_per_hour": dollars_per_hour, "max_seconds": limit}
    chosen = chosen_options(options, retry_before=iso_utc() if retry_failed else None, **more)

    ranks = Ranks.join()

    def on_row(state: State, row: Row) -> None:
        spent.append((row.seconds or 0.0) / (workers * ranks.world_size))
        live(state, row, spent)

    try:
        if ranks.world_size > 1 and (engine != "local" or workers > 1):
            raise click.UsageError("under torchrun its ranks are the workers; leave out --engine and --workers")
        gpus = num_gpus(workers * ranks.world_size, gpus_per_trial if engine == "ray" else None)
        if smoke or (smoke is None and gpus > 1):
            require_smoke(chosen)
        if ranks.world_size > 1:
            state = run_torchrun(chosen, ranks, on_row)
        elif engine == "ray":
            from pgolf_post.sweep.engines.ray import RayOptions, run_ray

            wanted = RayOptions(ray_address, workers, cpus_per_trial, gpus_per_trial, retries)
            state = run_ray(chosen, wanted, on_row)
        else:
            state = run_local(chosen, workers, on_row)
    finally:
        ranks.leave()
    if ranks.is_main:
        _remember(chosen, state)
        _report(chosen, state, plots, as_json, time.perf_counter() - started)


@command.command("table")
@sweep_options
@click.option("--plots/--no-plots", default=False, help="Draw figures beside the table (extra `plots`).")
@json_option
def table_command(plots: bool, as_json: bool, **options: Any) -> None:
    """Rank the rows that SPEC has so far, and write the table (and figures) under sweeps/results/."""
    from pgolf_post.sweep.run import Sweep

    started, chosen = time.perf_counter(), chosen_options(options)
    sweep = Sweep(chosen)
    try:
        state = sweep.state()
    finally:
        sweep.close()
    _report(chosen, state, plots, as_json, time.perf_counter() - started)


@command.command("watch")
@sweep_options
@click.option("--every", type=POSITIVE, default=5.0, show_default=True, help="Seconds between looks at the ledger.")
@json_option
def watch_command(every: float, as_json: bool, **options: Any) -> None:
    """Show the ranking each time a trial is done, until all are; whoever runs them."""
    from pgolf_post.sweep.run import Sweep
    from pgolf_post.sweep.table import facts_of, ranked, show

    sweep, seen = Sweep(chosen_options(options)), -1
    try:
        state = sweep.state()
        while state.open:
            if len(state.rows) != seen:
                seen = len(state.rows)
                show(state, options["spec"].stem)
            time.sleep(every)
            state = sweep.state()
    finally:
        sweep.close()
    show(state, options["spec"].stem)
    if as_json:
        print_json({"question": state.spec.question, "trials": [facts_of(state, row) for row in ranked(state)]})


def _remember(options: Options, state: State) -> None:
    """Write the decisions on trials of several seeds into the ledger."""
    from pgolf_post.ledger import Ledger
    from pgolf_post.sweep.outcomes import outcome_rows

    if rows := outcome_rows(state, options.name):
        with Ledger.open(options.places.root) as ledger:
            ledger.add_all(rows, replace=True)


def _report(options: Options, state: State, plots: bool, as_json: bool, seconds: float) -> None:
    from pgolf_post.sweep.table import answer, save, show

    show(state, options.name)
    written = save(state, options.results, options.name)
    if plots:
        from pgolf_post.sweep.figures import draw

        written += draw(state, options.results)
    say(f"written: {', '.join(str(path) for path in written)}")
    if as_json:
        print_json({**answer(state), "files": [str(path) for path in written], "seconds": round(seconds, 3)})
