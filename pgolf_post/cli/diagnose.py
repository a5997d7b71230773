"""`pgolf-post diagnose`: look inside a checkpoint, and mark what rules of thumb know as bad."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pgolf_post.base.progress import print_json, print_table, say
from pgolf_post.cli.common import (
    data_option,
    dollars_option,
    find_checkpoint,
    find_data,
    fresh_option,
    given_settings,
    json_option,
    load_view,
    quiet_option,
    settings_options,
    threads_option,
    weights_option,
)
from pgolf_post.diagnose.settings import DiagnoseSettings
from pgolf_post.errors import SettingsError, VerificationError

if TYPE_CHECKING:
    from pgolf_post.checkpoint import Checkpoint
    from pgolf_post.diagnose.stage import Diagnosis

FLAGS = {
    "tokens": "--tokens",
    "removal_tokens": "--removal-tokens",
    "seed": "--seed",
    "seq_len": "--seq-len",
}


@click.command("diagnose")
@click.argument("paths", metavar="[CKPT…]", nargs=-1, type=click.Path(path_type=Path))
@click.option(
    "--by",
    type=click.Choice(["role", "layer", "tensor"]),
    default="role",
    show_default=True,
    help="Show the worst of each role or each layer, or every tensor.",
)
@weights_option
@data_option
@settings_options(DiagnoseSettings, FLAGS)
@click.option(
    "--fail-on",
    "gates",
    multiple=True,
    metavar="RULE",
    help="Exit 4 if this rule marks a number; repeatable, for sweeps. An unknown name lists the rules.",
)
@click.option("--as-toml", is_flag=True, help="Print the learned scalars as keys of a recipe instead.")
@click.option(
    "--round",
    "digits",
    type=click.IntRange(0, 12),
    default=4,
    show_default=True,
    help="Decimals of --as-toml.",
)
@click.option("--plot", type=click.Path(path_type=Path), help="Draw several checkpoints' numbers over steps to a file.")
@fresh_option
@dollars_option
@threads_option
@quiet_option
@json_option
def command(
    paths: tuple[Path, ...],
    by: Any,
    weights: str | None,
    data_dir: Path | None,
    gates: tuple[str, ...],
    as_toml: bool,
    digits: int,
    plot: Path | None,
    fresh: bool,
    dollars_per_hour: float | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure the weights, activations and learned scalars of checkpoints, and mark what is known as bad.

    \b
    pgolf-post diagnose                                # the newest final checkpoint
    pgolf-post diagnose checkpoints/mine --plot run.svg  # a run: the same over steps
    pgolf-post diagnose CKPT --by tensor --tokens 0     # its weights alone, without text
    pgolf-post diagnose --fail-on dead-block --fail-on saturated-head
    pgolf-post diagnose --as-toml --round 2

    Weights: effective and stable rank, condition, kurtosis, outliers, twin rows. Activations on training text: norms
    by block and visit, what attention and MLP add, dead units, heads, soft-cap, and how far predictions move without
    each block. A second call with the same weights, text and settings reads the cache.
    """
    from pgolf_post.diagnose.recipe_keys import recipe_toml
    from pgolf_post.diagnose.report import text_of
    from pgolf_post.diagnose.rules import rule_named
    from pgolf_post.diagnose.stage import diagnose
    from pgolf_post.ledger.recording import record

    started = time.perf_counter()
    rules = [rule_named(name) for name in gates]
    settings = given_settings(DiagnoseSettings, options, "diagnose")
    checkpoints = _checkpoints(paths)
    if as_toml:
        if len(checkpoints) > 1:
            raise SettingsError(f"--as-toml prints one checkpoint's scalars, got {len(checkpoints)} checkpoints")
        click.echo(recipe_toml(load_view(checkpoints[0], weights), digits))
        return
    if plot and len(checkpoints) < 2:
        raise SettingsError("--plot draws numbers over steps: name several checkpoints, or a run's folder")

    # measure each, record each
    found: list[Diagnosis] = []
    for checkpoint in checkpoints:
        view = load_view(checkpoint, weights)
        wants_text = settings.tokens > 0 or data_dir is not None
        data = find_data(checkpoint, data_dir) if wants_text else None
        found.append(diagnose(view, data, settings, fresh))
    seconds = round(time.perf_counter() - started, 3)
    record(*(one.folder for one in found), dollars_per_hour=dollars_per_hour, seconds=seconds)

    # show: one whole, several over steps
    if len(found) == 1:
        _show(found[0], by)
    else:
        _show_series(found, by, plot)
    if as_json:
        print_json(_answer(found, settings, by, seconds))
    marked = [mark for one in found for mark in one.marks if mark.rule in rules]
    if marked:
        first = max(marked, key=lambda mark: mark.excess)
        raise VerificationError(
            f"{len(marked)} numbers are marked by {', '.join(sorted({mark.rule.name for mark in marked}))}; the worst: "
            f"{first.number.metric} of {first.number.subject} is {text_of(first.number.value)}, "
            f"limit {first.rule.limit:g}",
            hint=first.rule.advice,
        )


def _checkpoints(paths: tuple[Path, ...]) -> list[Checkpoint]:
    """Return the named checkpoints, those of each named run in step order, or the newest final one."""
    from pgolf_post.checkpoint import Checkpoint

    found: list[Checkpoint] = []
    for path in paths:
        is_run = path.is_dir() and not (path / "config.json").is_file()
        folders = sorted(meta.parent for meta in path.glob("step_*/meta.json")) if is_run else []
        found += [Checkpoint.open(folder) for folder in folders or [path]]
    return found or [find_checkpoint(None)]


def _show(diagnosis: Diagnosis, by: Any) -> None:
    from pgolf_post.diagnose import report

    print_table(report.title(diagnosis), report.MARK_HEADER, report.mark_rows(diagnosis.marks))
    for line in report.advice(diagnosis.marks):
        say(line)
    print_table(
        f"weights: the worst of each {by}" if by != "tensor" else "weights",
        report.weight_header(by),
        report.weight_rows(diagnosis.numbers, by),
    )
    blocks = report.block_rows(diagnosis.numbers)
    if blocks:
        print_table("blocks: norms, shares of ‖x‖ added, nats per token without it", report.BLOCK_HEADER, blocks)


def _show_series(found: list[Diagnosis], by: Any, plot: Path | None) -> None:
    from pgolf_post.curves.picture import draw_curves
    from pgolf_post.diagnose import report
    from pgolf_post.diagnose.series import panels, series, series_rows

    ordered = sorted(found, key=lambda one: one.step)
    curves = series(ordered, by)
    header = ("number", *(str(one.step) for one in ordered))
    print_table("over steps", header, series_rows(curves, [one.step for one in ordered]))
    print_table(
        "marked at each step",
        ("step", "marked", "the worst"),
        [(str(one.step), str(len(one.marks)), _worst(one)) for one in ordered],
    )
    say(report.title(ordered[-1]))
    if plot:
        draw_curves(panels(curves), "step", plot)
        say(f"drew {plot}")


def _worst(diagnosis: Diagnosis) -> str:
    if not diagnosis.marks:
        return ""
    worst = diagnosis.marks[0]
    return f"{worst.rule.name}: {worst.number.subject}"


def _answer(found: list[Diagnosis], settings: DiagnoseSettings, by: Any, seconds: float) -> dict[str, Any]:
    from pgolf_post.diagnose.series import series

    common = {"settings": settings.model_dump(mode="json"), "by": by, "seconds": seconds}
    if len(found) == 1:
        return {**found[0].facts(), **common}
    curves = [curve.facts() for curve in series(found, by)]
    return {"diagnoses": [one.facts() for one in found], "series": curves, **common}
