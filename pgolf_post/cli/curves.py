"""`pgolf-post curves`: training curves laid over each other, from any log."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pgolf_post.base.numbers import FiniteFloat
from pgolf_post.base.progress import print_json, print_table, say
from pgolf_post.cli.common import json_option, quiet_option
from pgolf_post.errors import SettingsError

if TYPE_CHECKING:
    from pgolf_post.curves.comparing import Difference
    from pgolf_post.curves.curve import Axis, Log


@click.command("curves")
@click.argument("paths", metavar="LOG…", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--by",
    type=click.Choice(["step", "tokens", "seconds"]),
    default="step",
    show_default=True,
    help="Compare at equal optimizer steps, training tokens or training seconds.",
)
@click.option(
    "--at",
    "points",
    metavar="N,N,…",
    help="Compare at these places of the axis.  [default: five, to the end of the common range]",
)
@click.option("--curve", metavar="NAME", help="Compare this curve.  [default: train_loss where all logs have it]")
@click.option(
    "--window",
    type=FiniteFloat(min=0, min_open=True),
    help="Smooth over this much of the axis.  [default: a fiftieth of the common range, or three points of a curve]",
)
@click.option("--plot", type=click.Path(path_type=Path), help="Draw the curves to this file: svg, png or pdf.")
@quiet_option
@json_option
def command(
    paths: tuple[Path, ...],
    by: Any,
    points: str | None,
    curve: str | None,
    window: float | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Lay training curves over each other and print where they differ, with the noise of the difference.

    \b
    pgolf-post curves checkpoints/mine train_seed42.log --at 500,1000,2000
    pgolf-post curves A/train.jsonl B/train.jsonl --by seconds --plot curves.svg
    pgolf-post curves train.log                       # the curves that a log holds

    LOG is a run's folder, a train.jsonl, a public script's training log, or CSV with a column `step`. The first is the
    control; differences are of the others minus the control. At each point a line is fitted to what lies within the
    window, and ± is the standard error of its value there. Runs that report the same places are compared point by
    point, which takes out the noise that both have.
    """
    from pgolf_post.curves import comparing, report
    from pgolf_post.curves.reading import read_log

    logs = [read_log(path) for path in paths]
    for log in logs:
        for note in log.notes:
            say(f"{log.path}: {note}")
    if len(logs) == 1:
        print_table(str(logs[0].path), report.LOG_HEADER, report.log_rows(logs))
        if plot:
            _draw(logs, curve or comparing.common_curve(logs), by, window, (), plot)
        if as_json:
            print_json({"logs": [log.facts() for log in logs]})
        return
    name = comparing.common_curve(logs, curve)
    curves = [log.curve(name) for log in logs]
    at = parse_points(points) if points else comparing.default_points(curves, by)
    names = _names(logs)
    differences: dict[str, list[Difference]] = {
        label: comparing.compare_curves(curves[0], other, by, at, window)
        for label, other in zip(names[1:], curves[1:], strict=True)
    }
    unit = f" ({curves[0].unit})" if curves[0].unit else ""
    how = f"smoothed over {window:,g} {by}" if window else "smoothed over as many as each curve needs"
    heading = f"{name}{unit} by {by}, {how}; control: {names[0]}"
    print_table(heading, report.difference_header("control", by), report.difference_rows(differences))
    if plot:
        _draw(logs, name, by, window, at, plot)
    if as_json:
        found = {label: [one.facts() for one in rows] for label, rows in differences.items()}
        settings = {"curve": name, "by": by, "window": window, "control": names[0]}
        print_json({**settings, "differences": found, "logs": [str(log.path) for log in logs]})


def parse_points(text: str) -> list[float]:
    """Parse `N,N,…`. Raises SettingsError naming what is no number."""
    try:
        return [float(part.replace("_", "")) for part in text.split(",")]
    except ValueError:
        raise SettingsError(f"--at {text!r}: expected numbers with commas, for example --at 500,1000") from None


def _names(logs: list[Log]) -> list[str]:
    """Return a name for each log; its path where two would have the same."""
    names = [log.name for log in logs]
    return [str(log.path) if names.count(log.name) > 1 else log.name for log in logs]


def _draw(logs: list[Log], name: str, by: Axis, window: float | None, at: Any, plot: Path) -> None:
    from pgolf_post.curves.comparing import default_window
    from pgolf_post.curves.picture import draw_curves
    from pgolf_post.curves.smoothing import smooth

    curves = [log.curve(name) for log in logs]
    width = window or default_window(curves, by)
    lines = [(label, smooth(curve, by, width)) for label, curve in zip(_names(logs), curves, strict=True)]
    draw_curves({f"{name}, smoothed over {width:,g} {by}": lines}, by, plot, at)
    say(f"drew {plot}")
