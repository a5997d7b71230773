"""Tables about averages for people: the parents of a blend, the candidates of a search, the lengths of post-hoc EMA."""

from __future__ import annotations

from collections.abc import Sequence

from pgolf_post.average.search import Search
from pgolf_post.average.snapshots import list_snapshots
from pgolf_post.base.progress import print_table, say
from pgolf_post.checkpoint import Checkpoint
from pgolf_post.errors import PgolfError


def show_blend(blended: Checkpoint) -> None:
    """Print the parents' shares, the metric beside the last parent's, and what to do next."""
    rows = [
        (f"{parent.get('run', blended.path.parent.name)}/{parent['folder']}", parent["view"], f"{parent['share']:.4f}",
         parent["id"][:12])
        for parent in blended.meta["parents"]
    ]  # fmt: skip
    print_table(f"{blended.path}", ("parent", "weights", "share", "id"), rows)
    metric = blended.meta["views"]["raw"]["metric"]
    compared = ", ".join(_parent_metrics(blended)) or "parents not measured"
    say(f"bpb {metric['bpb']:.5f} on {metric['tokens']:,} tokens of {metric['split']} ({compared})")
    say(f"next: pgolf-post requant {blended.path}")


def _parent_metrics(blended: Checkpoint) -> list[str]:
    """Return the last parent's recorded bpb by view, where its folder is still beside the blend's."""
    parent = blended.meta["parents"][-1]
    try:
        last = Checkpoint.open(blended.path.parent / parent["folder"])
    except PgolfError:
        return []
    recorded = {name: view["metric"]["bpb"] for name, view in last.meta["views"].items() if view.get("metric")}
    return [f"{last.meta['phase']} {name} {bpb:.5f}" for name, bpb in recorded.items()]


def show_search(search: Search) -> None:
    """Print the candidates of a finished search, the best first, and how much of the text it read."""
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


def show_lengths(final: Checkpoint, averages: Sequence[tuple[str, Checkpoint]]) -> None:
    """Print post-hoc averages of different lengths, and the final checkpoint's own bpb."""
    header = ("average", "mean age, steps", "error of profile", "snapshots", "bpb", "folder")
    rows = [
        (
            label, f"{average.meta['ema']['mean_age_steps']:,.1f}", f"{average.meta['reconstruction_error']:.3%}",
            str(len(average.meta["parents"])), f"{_bpb(average):.5f}", average.path.name,
        )
        for label, average in averages
    ]  # fmt: skip
    print_table(f"averages of {final.path.parent} at step {averages[0][1].meta['step']:,}", header, rows)
    references = {name: view["metric"]["bpb"] for name, view in final.meta["views"].items() if view["metric"]}
    say(f"{final.path.name}: " + ", ".join(f"{name} {bpb:.5f}" for name, bpb in references.items()))
    snapshots = list_snapshots(final.path.parent)
    total = sum(snapshot.path.stat().st_size for snapshot in snapshots)
    say(f"{len(snapshots)} snapshots of the run, {total:,} bytes{held_up(final)}")
    best = min((average for _, average in averages), key=_bpb)
    say(f"next: pgolf-post requant {best.path}")


def held_up(final: Checkpoint) -> str:
    """Return how long saving held the run up, where its checkpoint says so."""
    phases = final.meta.get("ledger", {}).get("phases", {})
    return f"; saving held the run up for {phases['checkpoint']['seconds']:.1f} s" if "checkpoint" in phases else ""


def _bpb(average: Checkpoint) -> float:
    return float(average.meta["views"]["raw"]["metric"]["bpb"])
