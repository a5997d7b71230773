"""`python -m benchmarks.minigolf play ROUND.toml --data FOLDER`, and `table`: rounds of mini golf and what they say."""

from __future__ import annotations

from pathlib import Path

import click

from benchmarks.minigolf.play import Game, play
from benchmarks.minigolf.rows import HEADER, ROWS_FILE, finish, grouped, read_rows, table_rows
from benchmarks.minigolf.settings import read_round
from benchmarks.minigolf.spending import Children, Runner
from pgolf_post.base.command_line import run_command
from pgolf_post.base.markdown import markdown_table
from pgolf_post.base.progress import print_json, print_table
from pgolf_post.data import DataFolder

OUT = Path("minigolf")

out_option = click.option(
    "--out", default=OUT, show_default=True, type=click.Path(path_type=Path), help="Checkpoint root of all rounds."
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.pass_context
def command(context: click.Context) -> None:
    """Play rounds of mini golf: the best bpb in a byte budget that a fixed number of processor seconds can make."""
    context.obj = context.obj or Children()


@command.command("play")
@click.argument("round_file", metavar="ROUND.toml", type=click.Path(path_type=Path))
@click.option("--data", required=True, type=click.Path(path_type=Path), help="Data folder with both splits.")
@out_option
@click.option("--seed", default=1337, show_default=True, type=click.IntRange(min=0), help="Seed of the training.")
@click.option(
    "--scale",
    default=1.0,
    show_default=True,
    type=click.FloatRange(0, 1, min_open=True),
    help="Share of a whole round's seconds and tokens.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the row as one JSON object in the last line of stdout.")
@click.pass_obj
def play_command(
    runner: Runner, round_file: Path, data: Path, out: Path, seed: int, scale: float, as_json: bool
) -> None:
    """Train, round and score as ROUND.toml says, and write a row to OUT/rows.jsonl and to the ledger.

    A round that was killed goes on where it was when the same command is given again; the processor seconds of all its
    lives count. Exit codes are those of the stage that failed, 3 for an artifact over the bytes.
    """
    wanted, recipe = read_round(round_file)
    folder = DataFolder.open(data)
    game = Game(wanted, recipe, round_file.parent, folder, out, seed, scale, runner)
    row = finish(game, play(game))
    print_table(game.name, HEADER, table_rows({wanted.name: [row]}, None))
    if as_json:
        print_json(row)


@command.command("table")
@out_option
@click.option("--rows", type=click.Path(path_type=Path), help="File of rows.  [default: OUT/rows.jsonl]")
@click.option("--baseline", help="Name of the round that the others are compared with by Welch's test.")
@click.option("--scale", default=1.0, show_default=True, help="Scale of the rounds to show.")
@click.option("--markdown", is_flag=True, help="Print Markdown, for a page of results.")
@click.option("--json", "as_json", is_flag=True, help="Print the rows as one JSON object in the last line of stdout.")
def table_command(
    out: Path, rows: Path | None, baseline: str | None, scale: float, markdown: bool, as_json: bool
) -> None:
    """Print the rows of one scale by round, means over seeds, and verdicts against a baseline."""
    chosen = [row for row in read_rows(rows or out / ROWS_FILE) if row["scale"] == scale]
    table = table_rows(grouped(chosen), baseline)
    if markdown:
        click.echo("\n".join(markdown_table(HEADER, table)))
    else:
        print_table(f"mini golf, scale {scale:g}", HEADER, table)
    if as_json:
        print_json({"rows": chosen})


if __name__ == "__main__":
    run_command(command)
