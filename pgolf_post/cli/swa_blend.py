"""`pgolf-post swa-blend`: average checkpoints into a new checkpoint, or search for the average that is best."""

from __future__ import annotations

import time
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pgolf_post.average.settings import SearchSettings, SwaSettings
from pgolf_post.base.numbers import FiniteFloat
from pgolf_post.base.progress import print_json
from pgolf_post.cli.averaging import SEARCH_FLAGS, after_fit_options, refuse_idle_tokens, search_among
from pgolf_post.cli.common import (
    checkpoint_argument,
    data_option,
    dollars_option,
    find_checkpoint,
    find_data,
    given_settings,
    json_option,
    quiet_option,
    settings_options,
    split_view,
    threads_option,
)
from pgolf_post.errors import SettingsError
from pgolf_post.settings import apply_override

if TYPE_CHECKING:
    from pgolf_post.average.linear import Part
    from pgolf_post.checkpoint import Checkpoint

Made = tuple["Checkpoint", bool, dict[str, Any]]  # the blend, whether it was there already, JSON facts


@click.command("swa-blend")
@checkpoint_argument
@click.option(
    "--ema-share",
    type=FiniteFloat(),
    help="Share of the final EMA, 0 to 1: 0 is the members alone, 1 the EMA.  [default: 0]",
)
@click.option("--steps", metavar="N,N,…", help="Average the run's checkpoints at these steps.")
@click.option("--last", type=int, help="Average this many checkpoints up to CHECKPOINT; 1 is its raw weights.")
@click.option("--phase", help="Average all from this phase on: warmdown, loops_on, frac70, ….  [default: warmdown]")
@click.option("--shares", metavar="W,W,…", help="Weight the members in these proportions, in step order.")
@click.option(
    "--part",
    "named",
    multiple=True,
    metavar="PATH[:VIEW]=SHARE",
    help="Blend any checkpoints by name instead; repeatable. The shares (0.25, 1/3, -0.5) must sum to 1.",
)
@click.option(
    "--allow-different",
    multiple=True,
    metavar="KEY",
    help="Let the parts differ in this config key (graph.active_loops); the result takes the last part's value.",
)
@click.option(
    "--method",
    help="Make another average of the run, by its name in the table of methods; an unknown name lists them.",
)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="One setting of --method; repeatable.")
@click.option("--search", is_flag=True, help="Score a family of blends on sampled windows and write the winner.")
@settings_options(SearchSettings, SEARCH_FLAGS)
@click.option(
    "--search-data", type=click.Path(path_type=Path), help="Choose on the validation split of this data folder instead."
)
@after_fit_options
@data_option
@dollars_option
@threads_option
@quiet_option
@json_option
def command(
    checkpoint: Path | None,
    named: tuple[str, ...],
    method: str | None,
    overrides: tuple[str, ...],
    search: bool,
    search_data: Path | None,
    after_fit: int | None,
    calibration_tokens: int | None,
    allow_different: tuple[str, ...],
    data_dir: Path | None,
    dollars_per_hour: float | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Average the raw weights that CHECKPOINT's run saved, from warm-down start to CHECKPOINT unless told otherwise.

    The result is a checkpoint folder beside the run's own, with its parents and their shares recorded, and its bpb
    measured as the run's checkpoints were. One model is held in memory, whatever the number of parts.

    \b
    pgolf-post swa-blend --ema-share 0.75                      a quarter SWA of the warm-down, the rest EMA
    pgolf-post swa-blend --steps 1500,2275,3412 --shares 1,2,1
    pgolf-post swa-blend --last 1 --ema-share 0.5              raw and EMA, half and half
    pgolf-post swa-blend --part A:ema=0.5 --part B:ema=1/2     any two checkpoints
    pgolf-post swa-blend --search                              which of them is best?
    pgolf-post swa-blend --search --after-fit 16000000         which is best once it is rounded to these bytes?
    pgolf-post swa-blend --method power-ema --set sigma=0.1    any average of the table

    --search compares EMA shares 100, 75, 50, 25, 0 % and the last n members on the same windows, drops candidates whose
    paired interval (documents as clusters) excludes that they are better, and stops when one is left. It chooses on
    validation text, as every ablation of the leaderboard does; to keep that text out of the choice, hold training
    shards out, adopt them as another folder's validation split, and name it with --search-data.

    With --after-fit each candidate is rounded as `fit` does it (with 8 states, without κ), and scored by its own loss
    plus the divergence that its artifact leaves: the loss expected of the artifact. The seconds and bytes that this
    took are printed. Statistics and artifacts are kept, so an interrupted search goes on where it stopped.
    """
    from pgolf_post.average.report import show_blend
    from pgolf_post.ledger.recording import record

    started = time.perf_counter()
    searching = {key: options.pop(key) for key in SEARCH_FLAGS}
    refuse_idle_tokens(after_fit, calibration_tokens)
    _refuse_idle(options, named, search, {**searching, "data": search_data, "after_fit": after_fit}, checkpoint)
    _refuse_beside_method(method, overrides, [named, search, allow_different, *options.values()])
    chosen = {key: _numbers(options[key], kind, key) for key, kind in (("steps", int), ("shares", float))}
    swa = given_settings(SwaSettings, {**options, **chosen, "allow_different": allow_different}, "swa-blend")
    if method:
        blended, cached, facts = _blend_by_method(checkpoint, method, overrides, data_dir)
    elif named:
        blended, cached, facts = _blend_named(named, data_dir, allow_different)
    elif search:
        settings = given_settings(SearchSettings, searching, "swa-blend --search")
        after = (after_fit, calibration_tokens)
        blended, cached, facts = _search(checkpoint, swa, settings, search_data, data_dir, after)
    else:
        blended, cached, facts = _blend_run(checkpoint, swa, data_dir)
    show_blend(blended)
    seconds = round(time.perf_counter() - started, 3)
    record(blended.path, dollars_per_hour=dollars_per_hour, seconds=seconds)
    if as_json:
        metric = blended.meta["views"]["raw"]["metric"]
        sums = {key: metric[key] for key in ("bpb", "nats", "tokens", "bytes")}
        answer = {"checkpoint": str(blended.path), "checkpoint_id": blended.meta["id"], **sums, "cached": cached}
        print_json({**answer, "no_op": blended.meta["no_op"], **facts, "seconds": seconds})


def _refuse_idle(
    options: dict[str, Any], named: tuple[str, ...], search: bool, searching: dict[str, Any], checkpoint: Path | None
) -> None:
    """Raise SettingsError naming options that would do nothing beside the others."""
    given = [f"--{key.replace('_', '-')}" for key, value in options.items() if value is not None]
    if named and (given or search or checkpoint):
        others = [*given, *(["--search"] if search else []), *([str(checkpoint)] if checkpoint else [])]
        raise SettingsError(f"--part names all that is blended; leave out {', '.join(others)}")
    if search and options["ema_share"] is not None:
        raise SettingsError("--search tries EMA shares itself; leave out --ema-share")
    flags = {**SEARCH_FLAGS, "data": "--search-data", "after_fit": "--after-fit"}
    idle = [flags[key] for key, value in searching.items() if value is not None]
    if idle and not search:
        raise SettingsError(f"{', '.join(idle)} does nothing without --search")


def _numbers(text: str | None, kind: Any, key: str) -> Any:
    if text is None:
        return None
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise SettingsError(f"--{key} {text!r}: expected numbers with commas between them") from None


def _refuse_beside_method(method: str | None, overrides: tuple[str, ...], others: list[Any]) -> None:
    """Raise SettingsError for --set without --method, and for options of the other averages beside it."""
    if overrides and not method:
        raise SettingsError("--set does nothing without --method")
    if method and any(value not in (None, False, ()) for value in others):
        raise SettingsError("--method takes its settings from --set KEY=VALUE; leave out the other options")


def _blend_run(path: Path | None, settings: SwaSettings, data_dir: Path | None) -> Made:
    from pgolf_post.average.linear import swa

    final = find_checkpoint(path)
    blended, cached = swa(final, settings, find_data(final, data_dir))
    return blended, cached, {"ema_share": settings.ema_share}


def _blend_by_method(path: Path | None, method: str, overrides: tuple[str, ...], data_dir: Path | None) -> Made:
    from pgolf_post.average.methods import get_method, make_average

    get_method(method)
    given: dict[str, Any] = {}
    for override in overrides:
        apply_override(given, override)
    final = find_checkpoint(path)
    average, cached = make_average(final, method, given, find_data(final, data_dir))
    return average, cached, {"method": method}


def _blend_named(named: tuple[str, ...], data_dir: Path | None, allow: tuple[str, ...]) -> Made:
    from pgolf_post.average.linear import linear_blend, save_blend

    blend = linear_blend([parse_part(text) for text in named], allow)
    blended, cached = save_blend(blend, "blend", find_data(blend.reference, data_dir), {})
    return blended, cached, {}


def parse_part(text: str) -> Part:
    """Return the part that `PATH[:VIEW]=SHARE` names; the view is by default EMA where the folder has it, else raw."""
    from pgolf_post.average.linear import Part
    from pgolf_post.checkpoint import Checkpoint

    place, equals, share = text.rpartition("=")
    try:
        fraction = float(Fraction(share.strip()))
    except (ValueError, ZeroDivisionError):
        raise SettingsError(f"--part {text!r}: expected PATH[:VIEW]=SHARE, for example runs/a:ema=1/3") from None
    if not equals or not place:
        raise SettingsError(f"--part {text!r}: expected PATH[:VIEW]=SHARE, for example runs/a:ema=1/3")
    path, view = split_view(place)
    checkpoint = Checkpoint.open(path)
    return Part(checkpoint, checkpoint.view_name(view), fraction)


def _search(
    path: Path | None,
    swa: SwaSettings,
    settings: SearchSettings,
    search_data: Path | None,
    data_dir: Path | None,
    after: tuple[int | None, int | None],  # bytes to round to, tokens of statistics
) -> Made:
    from pgolf_post.average.linear import linear_blend, save_blend
    from pgolf_post.average.search import family
    from pgolf_post.data import DataFolder

    final, allow = find_checkpoint(path), swa.allow_different
    data = find_data(final, data_dir)
    text = DataFolder.open(search_data) if search_data else data
    search, facts = search_among(final, family(final, swa.selection), text, data, settings, *after, allow)
    winner = search.winner
    blend = linear_blend(winner.parts, allow)
    blended, cached = save_blend(blend, "swa", data, {"ema_share": winner.ema_share, "search": facts})
    return blended, cached, {"ema_share": winner.ema_share, "search": facts}
