"""`pgolf-post ledger`: every run, artifact and score in one table; where it came from, and what was learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pgolf_post.base.progress import print_json, say
from pgolf_post.cli.common import dollars_option, json_option
from pgolf_post.ledger.exporting import FORMATS
from pgolf_post.ledger.report import show_import, show_row, show_rows, show_scan
from pgolf_post.ledger.schema import KINDS, VERDICTS, Row, Verdict, priced

root_option = click.option(
    "--root",
    default="checkpoints",
    show_default=True,
    type=click.Path(path_type=Path),
    help="The folder that holds ledger.sqlite.",
)
kind_option = click.option("--kind", type=click.Choice(KINDS), help="Only rows of this kind.")
run_option = click.option("--run", help="Only rows of this training run, sweep or imported log.")
where_option = click.option(
    "--where",
    "conditions",
    multiple=True,
    metavar="KEY=VALUE",
    help="Only rows in which this column, or key of settings or result, has this value; repeatable.",
)
replace_option = click.option("--replace", is_flag=True, help="Overwrite rows that are there with other content.")


@click.group("ledger")
def command() -> None:
    """Everything that was done here, with its lineage, its evidence and its conclusion.

    Commands write what they did into checkpoints/ledger.sqlite by themselves; `scan` adds what is on disk already,
    `import` the tables of an older log.
    """


@command.command("table")
@root_option
@kind_option
@run_option
@where_option
@click.option(
    "--sort", metavar="KEY", help="Sort ascending by a column or key, descending by -KEY.  [default: created]"
)
@click.option("--limit", type=click.IntRange(min=1), help="Show at most this many rows.")
@click.option("--show", metavar="KEY,KEY,…", help="Show these keys of result and settings as further columns.")
@json_option
def table_command(
    root: Path,
    kind: str | None,
    run: str | None,
    conditions: tuple[str, ...],
    sort: str | None,
    limit: int | None,
    show: str | None,
    as_json: bool,
) -> None:
    """List rows, one line each.

    \b
    pgolf-post ledger table --kind score --sort bpb --limit 10
    pgolf-post ledger table --kind diagnosis --show largest_condition,dead_units,marks
    pgolf-post ledger table --where verdict=positive --where protocol=plain
    """
    from pgolf_post.ledger.query import sorted_rows

    rows = _select(root, kind, run, conditions)
    rows = sorted_rows(rows, sort) if sort else rows
    shown = rows[:limit]
    keys = [key.strip() for key in show.split(",")] if show else []
    show_rows(f"{len(shown)} of {len(rows)} rows", shown, keys)
    if as_json:
        print_json({"rows": [row.facts() for row in shown], "count": len(rows)})


def _select(root: Path, kind: str | None, run: str | None, conditions: tuple[str, ...]) -> list[Row]:
    from pgolf_post.ledger import Ledger
    from pgolf_post.ledger.query import parse_where

    where = parse_where(conditions)
    with Ledger.open(root, read_only=True) as ledger:
        return ledger.rows(kind, run=run, where=where)


@command.command("show")
@click.argument("row_id", metavar="ID")
@root_option
@json_option
def show_command(row_id: str, root: Path, as_json: bool) -> None:
    """Show one row whole. ID is the beginning of an id or of a name; several that fit are listed."""
    from pgolf_post.ledger import Ledger

    with Ledger.open(root, read_only=True) as ledger:
        row = ledger.find(row_id)
        notes = [note for note in ledger.rows("note") if row.id in note.parents]
    show_row(row, notes)
    if as_json:
        print_json({**row.facts(), "notes": [note.facts() for note in notes]})


@command.command("lineage")
@click.argument("row_id", metavar="[ID]", required=False)
@root_option
@kind_option
@run_option
@where_option
@json_option
def lineage_command(
    row_id: str | None, root: Path, kind: str | None, run: str | None, conditions: tuple[str, ...], as_json: bool
) -> None:
    """Draw what came from what, with the difference of bpb and bytes to what it came from.

    With ID, only its ancestors and its descendants. Differences are between numbers of the same protocol and text.
    """
    from pgolf_post.ledger import Ledger
    from pgolf_post.ledger.lineage import draw, tree_of, trees

    if row_id and (kind or run or conditions):
        raise click.UsageError("ID names the rows; leave out --kind, --run and --where")
    if row_id:
        with Ledger.open(root, read_only=True) as ledger:
            found = tree_of(ledger.rows(), ledger.find(row_id))
        roots = [found] if found else []
    else:
        roots = trees(_select(root, kind, run, conditions))
    for tree in roots:
        say(draw(tree))
    nodes = [(depth, node) for tree in roots for depth, node in tree.walk()]
    count, deepest = sum(node.row is not None for _, node in nodes), max((depth for depth, _ in nodes), default=0)
    say(f"{count} rows in {len(roots)} trees, {deepest} generations deep at most")
    if as_json:
        print_json({"count": count, "roots": len(roots), "nodes": [{**n.facts(), "depth": d} for d, n in nodes]})


@command.command("phases")
@click.argument("row_id", metavar="[ID]", required=False)
@root_option
@kind_option
@run_option
@where_option
@json_option
def phases_command(
    row_id: str | None, root: Path, kind: str | None, run: str | None, conditions: tuple[str, ...], as_json: bool
) -> None:
    """Show where the time went, against both limits of 600 s: training, and evaluation.

    \b
    pgolf-post ledger phases            every row that has seconds by phase, in sums
    pgolf-post ledger phases 3fa2       one chain: training, statistics, quantizing, compressing, scoring

    Strictly every phase counts; by convention what reads training data, scoring and adapting. ID is a run, artifact or
    score; an artifact comes with its longest score. A cap (`schedule.seconds`) or `eval --time-budget` stands under
    "given".
    """
    from pgolf_post.ledger import Ledger
    from pgolf_post.ledger.phases import chain_of, phases_of, sums
    from pgolf_post.ledger.report import show_chain, show_phase_sums

    if row_id and (kind or run or conditions):
        raise click.UsageError("ID names the row; leave out --kind, --run and --where")
    if row_id is None:
        timed = [row for row in _select(root, kind, run, conditions) if row.phases]
        show_phase_sums(timed)
        if as_json:
            print_json({"rows": [{"id": row.id, "kind": row.kind, **sums(phases_of(row))} for row in timed]})
        return
    with Ledger.open(root, read_only=True) as ledger:
        row = ledger.find(row_id)
        chain = chain_of(ledger.rows(), row)
    phases = [phase for each in chain for phase in phases_of(each)]
    show_chain(row, phases)
    if as_json:
        of = [each.id for each in chain]
        print_json({"id": row.id, "of": of, **sums(phases), "phases": [phase.facts() for phase in phases]})


@command.command("diff")
@click.argument("one", metavar="A")
@click.argument("other", metavar="B")
@root_option
@json_option
def diff_command(one: str, other: str, root: Path, as_json: bool) -> None:
    """Show the settings in which A differs from B, and its difference in bpb with an interval.

    \b
    pgolf-post ledger diff run:wide run:narrow
    pgolf-post ledger diff width/wide width/control      trials of the sweep `width`, over all their seeds

    A and B are the beginning of an id or a name. Intervals are over seeds, else over documents where scores of both by
    one protocol are on disk.
    """
    from pgolf_post.ledger import Ledger
    from pgolf_post.sweep.row_difference import row_difference, show, subject

    with Ledger.open(root, read_only=True) as ledger:
        found = row_difference(ledger, root, subject(ledger, one), subject(ledger, other))
    for line in show(found):
        say(line)
    if as_json:
        print_json(found.facts())


@command.command("best")
@root_option
@click.option("--budget", type=click.IntRange(min=0), help="Only rows that count at most this many bytes.")
@kind_option
@run_option
@where_option
@click.option("--limit", default=10, show_default=True, type=click.IntRange(min=1), help="Show at most this many rows.")
@json_option
def best_command(
    root: Path,
    budget: int | None,
    kind: str | None,
    run: str | None,
    conditions: tuple[str, ...],
    limit: int,
    as_json: bool,
) -> None:
    """List the rows with the lowest bpb, under a budget of bytes if one is given.

    Scores of different texts or protocols do not compare; where the list mixes them, it says so.
    """
    from pgolf_post.errors import NotFoundError
    from pgolf_post.ledger.query import best_rows, texts_of

    scored = best_rows(_select(root, kind, run, conditions), None)
    fitting = best_rows(scored, budget)
    if not fitting:
        limit_text = f" and at most {budget:,} bytes" if budget is not None else ""
        raise NotFoundError(f"none of the rows has a bpb{limit_text}", hint="pgolf-post ledger table")
    shown = fitting[:limit]
    title = f"best {len(shown)} of {len(fitting)} rows with a bpb"
    show_rows(title, shown)
    texts = texts_of(shown)
    if len(texts) > 1:
        say(f"these are scores of {len(texts)} kinds, which do not compare: {'; '.join(texts)}; narrow by --where")
    if budget is not None and len(fitting) < len(scored):
        say(f"{len(scored) - len(fitting)} rows with a bpb are over {budget:,} bytes or have no bytes")
    if as_json:
        print_json({"rows": [row.facts() for row in shown], "count": len(fitting), "kinds": texts})


@command.command("note")
@click.argument("row_id", metavar="ID")
@click.argument("conclusion")
@root_option
@click.option("--verdict", type=click.Choice(VERDICTS), help="The outcome.")
@json_option
def note_command(row_id: str, conclusion: str, root: Path, verdict: Verdict | None, as_json: bool) -> None:
    """Write what was learned from a row.

    \b
    pgolf-post ledger note 3fa2 "λ above 0.2 only costs bytes" --verdict negative
    """
    from pgolf_post.ledger import Ledger

    with Ledger.open(root) as ledger:
        row = ledger.find(row_id)
        ledger.note(row.id, conclusion, verdict, kind=row.kind)
        noted = ledger.get(row.kind, row.id)
    assert noted is not None
    say(f"{noted.kind} {noted.name or noted.id}: {noted.verdict or 'no verdict'}: {noted.conclusion}")
    if as_json:
        print_json(noted.facts())


@command.command("export")
@root_option
@click.option("--format", "form", required=True, type=click.Choice(list(FORMATS)), help="The format of the rows.")
@click.option("--out", type=click.Path(path_type=Path), help="Write to this file.  [default: stdout]")
@kind_option
@run_option
@where_option
@json_option
def export_command(
    root: Path,
    form: str,
    out: Path | None,
    kind: str | None,
    run: str | None,
    conditions: tuple[str, ...],
    as_json: bool,
) -> None:
    """Write the rows for another program: csv (every field), jsonl (whole; `import` reads it), md (main columns)."""
    from pgolf_post.base.storage import atomic_file

    if as_json and out is None:
        raise click.UsageError("--json needs stdout for itself; name a file with --out")
    rows = _select(root, kind, run, conditions)
    text = FORMATS[form](rows)
    if out is None:
        click.echo(text, nl=False)
    else:
        with atomic_file(out) as building:
            building.write_text(text, encoding="utf-8")
    say(f"{len(rows)} rows as {form}" + (f" in {out}" if out else ""))
    if as_json:
        print_json({"path": str(out), "format": form, "rows": len(rows)})


@command.command("scan")
@root_option
@dollars_option
@json_option
def scan_command(root: Path, dollars_per_hour: float | None, as_json: bool) -> None:
    """Record the runs, checkpoints, statistics, artifacts and scores that lie under the root.

    What the ledger knows already is kept with its notes; scanning twice changes nothing.
    """
    from pgolf_post.ledger import Ledger
    from pgolf_post.ledger.disk import scan

    rows = scan(root)
    with Ledger.open(root) as ledger:
        new = ledger.complete_all([priced(row, dollars_per_hour) for row in rows])
    counts = show_scan(root, rows, new)
    if as_json:
        print_json({"rows": len(rows), "new": sum(new), "kinds": {k: v for k, v in counts.items() if v}})


@command.command("import")
@click.argument("file", type=click.Path(path_type=Path))
@root_option
@click.option(
    "--table",
    "chosen",
    default="all",
    show_default=True,
    help="Take these tables: all, or numbers with commas between them.",
)
@click.option(
    "--list", "list_only", is_flag=True, help="List the tables and what their columns would be taken as; write nothing."
)
@click.option("--map", "mapping", metavar="FIELD=COLUMN,…", help="Name the column of a field: number=Exp,base=Base.")
@click.option("--kind", type=click.Choice(KINDS), help="The kind of the rows.  [default: by the table's columns]")
@click.option("--run", help="Name of the log that the rows belong to.  [default: the file's name]")
@dollars_option
@replace_option
@json_option
def import_command(
    file: Path,
    root: Path,
    chosen: str,
    list_only: bool,
    mapping: str | None,
    kind: Any,
    run: str | None,
    dollars_per_hour: float | None,
    replace: bool,
    as_json: bool,
) -> None:
    """Take over the tables of an older log: Markdown, CSV, TSV, text copied from a rendered page, or our own .jsonl.

    \b
    pgolf-post ledger import experiments.md --list
    pgolf-post ledger import experiments.md --table 2 --map number=Exp,base=From --run notebook
    pgolf-post ledger lineage --run notebook

    Every row becomes a row, every cell is kept: what a column was taken as is printed, other columns stay in settings
    under their own names. A base (by number, name or first word of a name) becomes the parent.
    """
    from pgolf_post.ledger import Ledger
    from pgolf_post.ledger.importing import ImportSettings, read_log, require_rows
    from pgolf_post.settings import parse_settings

    fields = {
        "tables": chosen,
        "mapping": mapping or "",
        "kind": kind,
        "run": run,
        "dollars_per_hour": dollars_per_hour,
    }
    imported = read_log(file, parse_settings(ImportSettings, fields, "ledger import"))
    show_import(imported, file)
    new = 0
    if not list_only:
        require_rows(imported, file)
        with Ledger.open(root) as ledger:
            new = ledger.add_all(imported.rows, replace)
        say(f"{imported.rows_in} rows in, {len(imported.rows)} rows out; {new} new in {root}")
    if as_json:
        print_json({**imported.facts(), "new": new, "written": not list_only})
