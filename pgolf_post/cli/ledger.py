"""`pgolf-post ledger`: every run, artifact and score in one table; where it came from, and what was learned."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pgolf_post.base.progress import print_json, print_table, say, terminal_width
from pgolf_post.cli.common import dollars_option, json_option
from pgolf_post.ledger.schema import KINDS, VERDICTS, Row, Verdict, priced

if TYPE_CHECKING:
    from pgolf_post.ledger.importing import Imported

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
    "--where", "conditions", multiple=True, metavar="KEY=VALUE", help="A column or a key of settings or result."
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
@click.option("--sort", metavar="KEY", help="Ascending by any column or key; -KEY descending.  [default: when made]")
@click.option("--limit", type=click.IntRange(min=1), help="At most so many rows.")
@json_option
def table_command(
    root: Path,
    kind: str | None,
    run: str | None,
    conditions: tuple[str, ...],
    sort: str | None,
    limit: int | None,
    as_json: bool,
) -> None:
    """Rows, one line each.

    \b
    pgolf-post ledger table --kind score --sort bpb --limit 10
    pgolf-post ledger table --where verdict=positive --where protocol=plain
    """
    from pgolf_post.ledger.query import sorted_rows

    rows = _select(root, kind, run, conditions)
    rows = sorted_rows(rows, sort) if sort else rows
    shown = rows[:limit]
    _show_rows(f"{len(shown)} of {len(rows)} rows", shown)
    if as_json:
        print_json({"rows": [row.facts() for row in shown], "count": len(rows)})


HEADER = ("id", "kind", "run", "name", "bpb", "bytes", "seconds", "$", "verdict", "conclusion")


def _select(root: Path, kind: str | None, run: str | None, conditions: tuple[str, ...]) -> list[Row]:
    from pgolf_post.ledger import Ledger
    from pgolf_post.ledger.query import parse_where

    where = parse_where(conditions)
    with Ledger.open(root, read_only=True) as ledger:
        return ledger.rows(kind, run=run, where=where)


def _cells(row: Row) -> tuple[str, ...]:
    from pgolf_post.ledger.query import bpb_of, counted_bytes

    bpb, num_bytes = bpb_of(row), counted_bytes(row)
    numbers = ("" if bpb is None else f"{bpb:.5f}", "" if num_bytes is None else f"{num_bytes:,}")
    seconds = "" if row.seconds is None else f"{row.seconds:.1f}"
    dollars = "" if row.cost_dollars is None else f"{row.cost_dollars:.2f}"
    failed = f"error: {row.result['error']}" if row.result.get("error") else ""
    said = " ".join((row.conclusion or failed).split())
    return (
        _cut(row.id, 12),
        row.kind,
        _cut(row.run, 20),
        row.name,
        *numbers,
        seconds,
        dollars,
        row.verdict or "",
        said,
    )


def _show_rows(title: str, rows: Sequence[Row]) -> None:
    """Rows as a table as wide as the terminal: columns that say nothing are left out, name and conclusion are cut."""
    cells = [_cells(row) for row in rows]
    used = [n for n, name in enumerate(HEADER) if name == "id" or any(row[n] for row in cells)]
    widths = {HEADER[n]: max([len(HEADER[n]), *(len(row[n]) for row in cells)]) for n in used}
    free = terminal_width() - 1 - sum(3 + width for name, width in widths.items() if name not in ELASTIC) - 8
    name_width = max(MIN_TEXT, min(widths.get("name", 0), free - min(widths.get("conclusion", 0), free // 2)))
    limits = {"name": name_width, "conclusion": max(MIN_TEXT, free - min(name_width, widths.get("name", 0)))}
    cut = [tuple(_cut(row[n], limits.get(HEADER[n], len(row[n]))) for n in used) for row in cells]
    print_table(title, [HEADER[n] for n in used], cut)


ELASTIC, MIN_TEXT = ("name", "conclusion"), 12


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"


@command.command("show")
@click.argument("row_id", metavar="ID")
@root_option
@json_option
def show_command(row_id: str, root: Path, as_json: bool) -> None:
    """One row whole. ID is the beginning of an id or of a name; several that fit are listed."""
    from pgolf_post.ledger import Ledger

    with Ledger.open(root, read_only=True) as ledger:
        row = ledger.find(row_id)
        notes = [note for note in ledger.rows("note") if row.id in note.parents]
    cells = [(key, str(value)) for key, value in vars(row).items() if not isinstance(value, dict | tuple)]
    cells[2:2] = [(f"parent {number + 1}", parent) for number, parent in enumerate(row.parents)]
    cells += [
        (f"{part}.{key}", str(value)) for part in ("settings", "result") for key, value in vars(row)[part].items()
    ]
    cells += [(f"note, {note.created}", f"{note.verdict or ''} {note.conclusion}".strip()) for note in notes]
    for key, value in cells:  # not a table: no value is cut
        if value not in ("None", ""):
            say(f"{key:<{max(len(name) for name, _ in cells)}}  {value}")
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


@command.command("best")
@root_option
@click.option("--budget", type=click.IntRange(min=0), help="Only what counts at most so many bytes.")
@kind_option
@run_option
@where_option
@click.option("--limit", default=10, show_default=True, type=click.IntRange(min=1), help="At most so many rows.")
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
    """The rows with the lowest bpb, under a budget of bytes if one is given.

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
    _show_rows(title, shown)
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
@click.option("--verdict", type=click.Choice(VERDICTS), help="What it was.")
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
@click.option(
    "--format", "form", required=True, type=click.Choice(["csv", "jsonl", "md"]), help="What the rows are written as."
)
@click.option("--out", type=click.Path(path_type=Path), help="A file to write.  [default: stdout]")
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
    from pgolf_post.ledger.exporting import FORMATS

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
    counts = {kind: sum(row.kind == kind for row in rows) for kind in KINDS}
    table = [
        (kind, str(count), str(sum(fresh for row, fresh in zip(rows, new, strict=True) if row.kind == kind)))
        for kind, count in counts.items()
        if count
    ]
    print_table(f"{root}: {len(rows)} rows, {sum(new)} of them new", ("kind", "on disk", "new"), table)
    if as_json:
        print_json({"rows": len(rows), "new": sum(new), "kinds": {k: v for k, v in counts.items() if v}})


@command.command("import")
@click.argument("file", type=click.Path(path_type=Path))
@root_option
@click.option("--table", "chosen", default="all", show_default=True, help="Which tables: all, or numbers like 1,3.")
@click.option("--list", "list_only", is_flag=True, help="List the tables and what their columns would be; stop.")
@click.option("--map", "mapping", metavar="FIELD=COLUMN,…", help="Say what a column is: number=Exp,base=Base.")
@click.option("--kind", type=click.Choice(KINDS), help="Kind of the rows.  [default: by the table's columns]")
@click.option("--run", help="Name of the log the rows belong to.  [default: the file's name]")
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
    from pgolf_post.ledger.importing import ImportSettings, read_log
    from pgolf_post.settings import parse_settings

    fields = {
        "tables": chosen,
        "mapping": mapping or "",
        "kind": kind,
        "run": run,
        "dollars_per_hour": dollars_per_hour,
    }
    imported = read_log(file, parse_settings(ImportSettings, fields, "ledger import"))
    _show_import(imported, file)
    new = 0
    if not list_only:
        with Ledger.open(root) as ledger:
            new = ledger.add_all(imported.rows, replace)
        say(f"{imported.rows_in} rows in, {len(imported.rows)} rows out; {new} new in {root}")
    if as_json:
        print_json({**imported.facts(), "new": new, "written": not list_only})


def _show_import(imported: Imported, file: Path) -> None:
    rows = [
        (table.title, str(table.number), table.form, str(len(table.rows)), "yes" if table.chosen else "no")
        for table in imported.tables
    ]
    if not imported.tables:
        say(f"{file}: {len(imported.rows)} whole rows")
        return
    print_table(f"{file}: {len(rows)} tables", ("heading", "table", "form", "rows", "taken"), rows)
    for declared in imported.declared:
        say(declared)
