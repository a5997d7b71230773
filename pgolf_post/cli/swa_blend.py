"""`pgolf-post swa-blend`: average checkpoints into a new checkpoint, or search for the average that is best."""

from __future__ import annotations

import time
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pgolf_post.average.settings import SearchSettings, Selection
from pgolf_post.base.progress import print_json, print_table, say
from pgolf_post.cli.common import (
    checkpoint_argument,
    data_option,
    dollars_option,
    find_checkpoint,
    find_data,
    given_settings,
    json_option,
    settings_options,
    split_view,
)
from pgolf_post.errors import SettingsError

if TYPE_CHECKING:
    from pgolf_post.average.linear import Part
    from pgolf_post.average.search import Search
    from pgolf_post.checkpoint import Checkpoint

SEARCH_FLAGS = {
    "max_tokens": "--search-tokens",
    "tolerance": "--search-tolerance",
    "level": "--search-level",
    "seed": "--search-seed",
}

Made = tuple["Checkpoint", bool, dict[str, Any]]  # the blend, whether it was there already, JSON facts


@click.command("swa-blend")
@checkpoint_argument
@click.option(
    "--ema-share", type=float, help="Share of the final EMA: 0 = the members alone, 1 = the EMA.  [default: 0]"
)
@click.option("--steps", metavar="N,N,…", help="Members: the run's checkpoints at these steps.")
@click.option("--last", type=int, help="Members: the last so many up to CHECKPOINT; 1 = its raw weights.")
@click.option("--phase", help="Members: all from this phase on (warmdown, loops_on, frac70 …).  [default: warmdown]")
@click.option("--shares", metavar="W,W,…", help="Proportions of the members in step order.  [default: equal]")
@click.option(
    "--part",
    "named",
    multiple=True,
    metavar="PATH[:VIEW]=SHARE",
    help="Blend any checkpoints by name instead; repeatable. Shares (0.25, 1/3, -0.5) sum to 1.",
)
@click.option(
    "--allow-different",
    multiple=True,
    metavar="KEY",
    help="A config key in which the parts may differ (graph.active_loops); the result takes the last part's.",
)
@click.option("--search", is_flag=True, help="Score a family of blends on sampled windows and write the winner.")
@settings_options(SearchSettings, SEARCH_FLAGS)
@click.option(
    "--search-data", type=click.Path(path_type=Path), help="Choose on this folder's validation split instead."
)
@data_option
@dollars_option
@json_option
def command(
    checkpoint: Path | None,
    named: tuple[str, ...],
    search: bool,
    search_data: Path | None,
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

    --search compares EMA shares 100, 75, 50, 25, 0 % and the last n members on the same windows, drops candidates whose
    paired interval (documents as clusters) excludes that they are better, and stops when one is left. It chooses on
    validation text, as every ablation of the leaderboard does; to keep that text out of the choice, hold training
    shards out, adopt them as another folder's validation split, and name it with --search-data.
    """
    from pgolf_post.ledger.recording import record

    started = time.perf_counter()
    searching = {key: options.pop(key) for key in SEARCH_FLAGS}
    _refuse_idle(options, named, search, {**searching, "data": search_data}, checkpoint)
    ema_share = options.pop("ema_share") or 0.0
    chosen = {key: _numbers(options[key], kind, key) for key, kind in (("steps", int), ("shares", float))}
    selection = given_settings(Selection, {**options, **chosen}, "swa-blend")
    if named:
        blended, cached, facts = _blend_named(named, data_dir, allow_different)
    elif search:
        settings = given_settings(SearchSettings, searching, "swa-blend --search")
        blended, cached, facts = _search(checkpoint, selection, settings, search_data, data_dir, allow_different)
    else:
        blended, cached, facts = _blend_run(checkpoint, ema_share, selection, data_dir, allow_different)
    _show(blended)
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
    idle = [SEARCH_FLAGS.get(key, "--search-data") for key, value in searching.items() if value is not None]
    if idle and not search:
        raise SettingsError(f"{', '.join(idle)} does nothing without --search")


def _numbers(text: str | None, kind: Any, key: str) -> Any:
    if text is None:
        return None
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise SettingsError(f"--{key} {text!r}: expected numbers with commas between them") from None


def _blend_run(
    path: Path | None, ema_share: float, selection: Selection, data_dir: Path | None, allow: tuple[str, ...]
) -> Made:
    from pgolf_post.average.linear import swa_blend

    final = find_checkpoint(path)
    blended, cached = swa_blend(final, ema_share, find_data(final, data_dir), selection, allow)
    return blended, cached, {"ema_share": ema_share}


def _blend_named(named: tuple[str, ...], data_dir: Path | None, allow: tuple[str, ...]) -> Made:
    from pgolf_post.average.linear import linear_blend, save_blend

    blend = linear_blend([parse_part(text) for text in named], allow)
    blended, cached = save_blend(blend, "blend", find_data(blend.reference, data_dir), {})
    return blended, cached, {}


def parse_part(text: str) -> Part:
    """`PATH[:VIEW]=SHARE` → a part; the view is by default EMA where the folder has it, else raw."""
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
    selection: Selection,
    settings: SearchSettings,
    search_data: Path | None,
    data_dir: Path | None,
    allow: tuple[str, ...],
) -> Made:
    from pgolf_post.average.linear import linear_blend, save_blend
    from pgolf_post.average.search import family, search_blends
    from pgolf_post.data import DataFolder

    final = find_checkpoint(path)
    data = find_data(final, data_dir)
    text = DataFolder.open(search_data) if search_data else data
    found = search_blends(final, family(final, selection), text, settings, allow)
    _show_search(found)
    winner, facts = found.winner, {**found.facts(), "data_manifest_sha256": text.manifest_sha256}
    blend = linear_blend(winner.parts, allow)
    blended, cached = save_blend(blend, "swa", data, {"ema_share": winner.ema_share, "search": facts})
    return blended, cached, {"ema_share": winner.ema_share, "search": facts}


def _show_search(search: Search) -> None:
    rows = []
    differences = [(search.difference(candidate), candidate) for candidate in search.candidates]
    for difference, candidate in sorted(differences, key=lambda pair: pair[0].bpb):
        interval = f"{difference.low:+.5f} … {difference.high:+.5f}"
        end = "winner" if candidate is search.winner else f"dropped in round {candidate.dropped}"
        end = "in the running" if candidate.dropped is None and candidate is not search.winner else end
        shown = ("", "") if candidate is search.control else (f"{difference.bpb:+.5f}", interval)
        rows.append((candidate.name, f"{candidate.scored.bpb:.5f}", *shown, f"{candidate.scored.tokens:,}", end))
    sure = f"{search.settings.level:.0%} for the whole search, {search.interval_level:.2%} each"
    header = ("blend", "bpb", f"against {search.control.name}", f"interval ({sure})", "tokens", "")
    print_table(f"search on {search.windows:,} sampled windows", header, rows)
    full = len(search.candidates) * search.winner.scored.tokens
    say(f"{search.tokens:,} tokens scored, {search.tokens / full:.0%} of scoring all {len(search.candidates)} as far")


def _show(blended: Checkpoint) -> None:
    """The parents' table, the metric, and what to do next."""
    rows = [
        (f"{parent['run']}/{parent['folder']}", parent["view"], f"{parent['share']:.4f}", parent["id"][:12])
        for parent in blended.meta["parents"]
    ]
    print_table(f"{blended.path}", ("parent", "weights", "share", "id"), rows)
    metric = blended.meta["views"]["raw"]["metric"]
    compared = ", ".join(_parent_metrics(blended)) or "parents not measured"
    say(f"bpb {metric['bpb']:.5f} on {metric['tokens']:,} tokens of {metric['split']} ({compared})")
    say(f"next: pgolf-post requant {blended.path}")


def _parent_metrics(blended: Checkpoint) -> list[str]:
    """The last parent's recorded bpb by view, where its folder is still beside the blend's run."""
    from pgolf_post.checkpoint import Checkpoint
    from pgolf_post.errors import PgolfError

    parent = blended.meta["parents"][-1]
    try:
        last = Checkpoint.open(blended.path.parent / parent["folder"])
    except PgolfError:
        return []
    recorded = {name: view["metric"]["bpb"] for name, view in last.meta["views"].items() if view.get("metric")}
    return [f"{last.meta['phase']} {name} {bpb:.5f}" for name, bpb in recorded.items()]
