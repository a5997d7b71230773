"""`pgolf-post submit`: a record folder that runs by itself, or the objections to somebody's."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pgolf_post.base.progress import print_json, print_table, say
from pgolf_post.cli.common import data_option, find_data, json_option, quiet_option, threads_option
from pgolf_post.cli.packing import budget_option
from pgolf_post.cli.scoring import parse_protocol, protocol_options

if TYPE_CHECKING:
    from pgolf_post.submit.explain import PartBytes

MAKE = "make"


class SubmitGroup(click.Group):
    """A group whose first command needs no name: `submit ARTIFACT…` is `submit make ARTIFACT…`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = [MAKE, *args]
        return super().parse_args(ctx, args)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return the named command; any other word is an artifact of the first one."""
        return self.commands.get(cmd_name, self.commands[MAKE])


@click.group("submit", cls=SubmitGroup)
def command() -> None:
    """Make a record folder that runs by itself, or check one: `submit ARTIFACT…` is `submit make ARTIFACT…`."""


@command.command(MAKE)
@click.argument("artifacts", metavar="ARTIFACT...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--name", required=True, help="Name of the submission.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write, which must not exist.")
@data_option
@protocol_options
@click.option(
    "--recipe",
    type=click.Path(path_type=Path),
    help="Recipe of the training run: the script trains, quantizes and packs, too.  [default: it only scores]",
)
@click.option(
    "--prove-training", is_flag=True, help="With --recipe, train by the script, alone, and compare the symbols."
)
@click.option("--author", default="", help="Name of the author, for submission.json.")
@click.option("--github-id", default="", help="GitHub account of the author, for submission.json.")
@click.option("--blurb", default="", help="A sentence or two on what is new, for README.md and submission.json.")
@click.option(
    "--against", metavar="R1,R2,R3", help="Test against these bpb of a record's seeds, or those of a submission.json."
)
@click.option(
    "--draft", is_flag=True, help="Make it with fewer than three seeds, untested or too slow, and say so in it."
)
@budget_option
@click.option(
    "--count",
    "counted",
    type=click.Choice(["strict", "convention"]),
    default="strict",
    show_default=True,
    help="Count the files as they lie there (strict), or the code after minifying and wrapping (convention).",
)
@click.option(
    "--proof-tokens",
    type=click.IntRange(min=2),
    help="Run the script on only so many tokens, from the start.  [default: all that are scored]",
)
@click.option(
    "--audit-tokens", type=click.IntRange(min=3), help="Length of the audit's excerpt in tokens.  [default: as needed]"
)
@click.option(
    "--skip-audit", is_flag=True, help="Do not audit where the ledger has no audit by this protocol; for drafts."
)
@click.option("--explain", "explained", is_flag=True, help="Show what each part of the script costs in bytes.")
@threads_option
@quiet_option
@json_option
def make(artifacts: tuple[Path, ...], data_dir: Path | None, explained: bool, as_json: bool, **options: Any) -> None:
    """Make a record folder from one ARTIFACT of each seed, run its script alone, and keep it if it reproduces.

    \b
    pgolf-post submit A1 A2 A3 --name "My record" --out records/mine --protocol sliding --against 1.081,1.082,1.080
    pgolf-post submit ARTIFACT --name draft --out draft --draft --protocol ttt --ttt lora --proof-tokens 5000

    train_gpt.py is made of the toolkit's own modules, as far as this model and protocol reach, and needs torch, numpy,
    brotli and sentencepiece alone. It is run in an empty folder without this package and without a network, and must
    print the nats that our scorer gives, to the last bit. Exit codes: 3 over the budget, 4 if rules or proof fail.
    """
    from pgolf_post.submit.stage import Order, record_to_beat, submit

    started = time.perf_counter()
    if options["prove_training"] and options["recipe"] is None:
        raise click.UsageError("--prove-training belongs to --recipe")
    data, config = _opened(artifacts[0], data_dir)
    order = Order(
        options["name"],
        parse_protocol(options, config, "submit"),
        options["out"],
        options["author"],
        options["github_id"],
        options["blurb"],
        options["draft"],
        options["counted"] == "convention",
        options["budget"],
        options["proof_tokens"],
        options["audit_tokens"],
        options["skip_audit"],
        record_to_beat(options["against"]) if options["against"] else (),
        options["recipe"],
        options["prove_training"],
    )
    made = submit(artifacts, data, order)
    facts = made.facts
    proved = next(iter(facts["seed_results"].values()))["proof"]
    rows = [
        ("bpb", f"{facts['val_bpb']:.6f}"),
        ("code", f"{facts['bytes_code']:,} B"),
        ("artifact and code", f"{facts['bytes_total']:,} B"),
        ("proof", f"the same nats over {proved['tokens']:,} tokens"),
    ]
    print_table(str(made.folder), ("submission", "value"), rows)
    for remark in made.remarks:
        say(f"draft: {remark}")
    if explained:
        show_parts(made.parts)
    if as_json:
        print_json({"out": str(made.folder), **facts, "seconds": round(time.perf_counter() - started, 3)})


def _opened(artifact: Path, data_dir: Path | None) -> tuple[Any, Any]:
    """Return the data that artifacts are scored on, and the first one's config."""
    from pgolf_post.submit.seeds import Seed

    seed = Seed.open(artifact)
    return find_data(seed.checkpoint, data_dir), seed.manifest["config"]


def show_parts(parts: Sequence[PartBytes]) -> None:
    """Print what each part of a script costs."""
    rows = [(part.name, f"{part.source_bytes:,}", f"{part.packed_bytes:,}") for part in parts]
    total = ("in all", f"{sum(p.source_bytes for p in parts):,}", f"{sum(p.packed_bytes for p in parts):,}")
    print_table("train_gpt.py", ("part", "source bytes", "bytes when packed"), [*rows, total])


@command.command("check")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--data", "data_dir", type=click.Path(path_type=Path), help="Folder of the validation text, to run it on."
)
@budget_option
@click.option(
    "--count",
    "counted",
    type=click.Choice(["strict", "convention"]),
    default="strict",
    show_default=True,
    help="Object to real files over the budget (strict), or only to wrapped ones (convention).",
)
@threads_option
@quiet_option
@json_option
def check(folder: Path, data_dir: Path | None, budget: int, counted: str, as_json: bool) -> None:
    """Review anyone's record FOLDER: count it, read its logs, run what can be run, and list the objections.

    \b
    pgolf-post submit check records/track_10min_16mb/2026-04-01_Somebody
    pgolf-post submit check records/mine --data data/fineweb10B_sp1024

    Loss and bpb of the logs imply a number of bytes of text, which must be the validation text's. A folder with an
    artifact of ours is run alone. The exit code is 3 over the budget, 4 with any other objection.
    """
    from pgolf_post.errors import OverBudgetError, VerificationError
    from pgolf_post.submit.check import check_folder, objection_rows

    review = check_folder(folder, data_dir, budget)
    objections = [each for each in review.objections if counted == "strict" or each.name != "over-on-disk"]
    shown = [("artifact", review.artifact_bytes), ("code", review.code_bytes), ("real files", review.strict_bytes)]
    shown.append(("with the code wrapped", review.convention_bytes))
    rows = [(name, "unknown" if value is None else f"{value:,} B") for name, value in shown]
    for log in review.logs:
        final = log.final
        seconds = "" if log.train_seconds is None else f", {log.train_seconds:.1f} s of training"
        rows.append((log.path.name, f"{final.bpb:.6f} bpb{seconds}" if final else seconds.removeprefix(", ")))
    rows.append(("run", review.ran))
    print_table(str(folder), ("what", "value"), rows)
    print_table("Objections" if objections else "No objections", ("name", "evidence"), objection_rows(objections))
    if as_json:
        print_json({**review.facts(), "objections": [vars(each) for each in objections]})
    if any(each.name.startswith("over-budget") or each.name == "over-on-disk" for each in objections):
        raise OverBudgetError(f"{folder}: {'; '.join(each.evidence for each in objections)}")
    if objections:
        raise VerificationError(f"{folder}: {len(objections)} objections: {', '.join(e.name for e in objections)}")


@command.command("times")
@click.argument("artifact", type=click.Path(path_type=Path))
@quiet_option
@json_option
def times(artifact: Path, as_json: bool) -> None:
    """Show the seconds of ARTIFACT's whole chain, from training to scoring, against both limits of 600 s.

    Strictly every phase counts; by convention what reads training data, scoring and adapting. The evaluation is that of
    the artifact's longest recorded score.
    """
    from pgolf_post.ledger.phases import HEADER, phase_rows, sums
    from pgolf_post.submit.chain import chain
    from pgolf_post.submit.seeds import Seed

    seed = Seed.open(artifact)
    own = [each for each in seed.scores() if each["of"] == "artifact"]
    longest = max(own, key=lambda each: int(each["tokens"]), default=None)
    phases = chain(seed, longest["meta"] if longest else None)
    print_table(str(artifact), HEADER, phase_rows(phases))
    if seed.training_seconds() is None:
        say("the seconds of its training run are not known")
    if longest is None:
        say("the artifact has no recorded score: pgolf-post eval")
    if as_json:
        print_json({"path": str(artifact), **sums(phases), "phases": [phase.facts() for phase in phases]})
