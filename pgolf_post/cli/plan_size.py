"""`pgolf-post plan-size`: which size of a recipe gives the lowest expected bpb in a byte budget after given seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click

from pgolf_post.base.numbers import FiniteFloat, Numbers
from pgolf_post.base.progress import print_json, print_table, say
from pgolf_post.cli.common import json_option, quiet_option, threads_option
from pgolf_post.fit.settings import FitSettings

POSITIVE = FiniteFloat(min=0, min_open=True)


def _distinct(_context: click.Context, _option: click.Parameter, values: tuple[float, ...]) -> tuple[float, ...]:
    """Return numbers that are positive and differ. Raises BadParameter."""
    if min(values) <= 0 or len(set(values)) < len(values):
        raise click.BadParameter(f"{','.join(f'{value:g}' for value in values)}: numbers above 0, each once")
    return values


@click.command("plan-size")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--budget", required=True, type=click.IntRange(min=1), help="Bytes of the artifact.")
@click.option("--seconds", required=True, type=POSITIVE, help="Seconds of the whole run, as the recipe's clock counts.")
@click.option(
    "--size",
    "sizes",
    multiple=True,
    metavar="'KEY=VALUE …'",
    help="Changes of the recipe that make one size, with spaces between; repeatable.  [default: four widths]",
)
@click.option(
    "--try",
    "tried",
    multiple=True,
    metavar="'KEY=VALUE …'",
    help="Changes of the recipe that cost bytes but are no size, tried at every size beside the recipe as it is: "
    "n-gram tables (model.bigram_buckets=4096), another vocabulary (data.dir=FOLDER); repeatable.",
)
@click.option(
    "--lengths",
    default="0.025,0.1",
    show_default=True,
    type=Numbers(),
    callback=_distinct,
    help="Lengths of the short runs, as shares of --seconds.",
)
@click.option(
    "--bits",
    default="2,3,4",
    show_default=True,
    type=Numbers(),
    callback=_distinct,
    help="Bits a weight at which the gap is measured, on the longest run of each size.",
)
@click.option("--alpha", type=POSITIVE, help="Hold the exponent of parameters at this value instead of fitting it.")
@click.option("--beta", type=POSITIVE, help="Hold the exponent of training tokens at this value instead of fitting it.")
@click.option("--eval-tokens", type=click.IntRange(min=2), help="Score only this many validation tokens.")
@click.option(
    "--calibration-tokens", default=65536, show_default=True, type=click.IntRange(min=2), help="Tokens of statistics."
)
@click.option(
    "--kappa-tokens",
    default=FitSettings().kappa_tokens,
    show_default=True,
    type=click.IntRange(min=2),
    help="Tokens that each measurement of κ reads.",
)
@click.option(
    "--root",
    default=Path("checkpoints"),
    show_default=True,
    type=click.Path(path_type=Path),
    help="Folder that the runs go to.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the recommended recipe to this TOML file.",
)
@threads_option
@quiet_option
@json_option
def command(
    recipe: Path,
    budget: int,
    seconds: float,
    sizes: tuple[str, ...],
    tried: tuple[str, ...],
    lengths: tuple[float, ...],
    bits: tuple[float, ...],
    alpha: float | None,
    beta: float | None,
    eval_tokens: int | None,
    calibration_tokens: int,
    kappa_tokens: int,
    root: Path,
    out: Path | None,
    as_json: bool,
) -> None:
    """Choose the size of RECIPE's model that is expected to have the lowest bpb in --budget bytes after --seconds.

    \b
    pgolf-post plan-size RECIPE.toml --budget 2000000 --seconds 4800
    pgolf-post plan-size RECIPE.toml --budget 2000000 --seconds 4800 \\
      --size "model.model_dim=256 model.num_layers=6" --size "model.model_dim=320 model.num_layers=5" …
    pgolf-post plan-size RECIPE.toml --budget 2000000 --seconds 4800 \\
      --try model.bigram_buckets=4096 --try "model.bigram_buckets=16384 model.bigram_dim=64"
    pgolf-post plan-size RECIPE.toml --budget 2000000 --seconds 4800 --try data.dir=data/sp2048

    A ladder of short runs is trained (four sizes at two lengths), and a law loss(parameters, tokens) + gap(bits a
    weight) is fitted to it. What --try names shifts the loss by a constant of its own. Other vocabularies score the
    same text, per byte. The table has every size's expectation with its 95 % interval, best first. Every recipe is read
    before the first is trained. Runs that are there are found again, so the same command goes on after a kill. A ladder
    that does not tell the law's coefficients apart is refused, and the message names them.
    """
    from pgolf_post.base.storage import atomic_file, require_writable
    from pgolf_post.sizing.choose import HEADER, Laws, ranked, remark
    from pgolf_post.sizing.ladder import LadderSettings, climb, default_sizes, recommended
    from pgolf_post.sizing.law import fit_gap, fit_loss

    chosen = tuple(tuple(size.split()) for size in sizes) or default_sizes(recipe)
    fitted = FitSettings(kappa_tokens=kappa_tokens)
    lengths_seconds = tuple(share * seconds for share in lengths)
    variants = tuple(tuple(changes.split()) for changes in tried)
    settings = LadderSettings(recipe, chosen, lengths_seconds, bits, eval_tokens, calibration_tokens, fitted, variants)
    _require_room(chosen, len(variants), lengths, alpha, beta)
    if out is not None:
        require_writable(out)
    ladder = climb(settings, root)
    held = {name: value for name, value in (("alpha", alpha), ("beta", beta)) if value is not None}
    laws = Laws(fit_loss(ladder.runs, held), fit_gap(*zip(*ladder.gaps, strict=True)))
    found = ranked(ladder.candidates, laws, budget, seconds)
    print_table(f"{budget:,} bytes after {seconds:g} s", HEADER, [one.cells() for one in found])
    note = remark(found)
    say(note)
    names = [one.name for one in ladder.candidates]
    changes = list(settings.trees.values())[names.index(found[0].candidate.name)]
    text = recommended(settings, changes, seconds)
    if out is None:
        say(text)
    else:
        with atomic_file(out) as building:
            building.write_text(text, encoding="utf-8")
        say(f"recipe of {found[0].candidate.name}: {out}")
    if as_json:
        law = {"loss": laws.loss.facts(), "gap_slope": laws.gap.slope}
        runs = [dict(vars(run)) for run in ladder.runs]
        print_json({"sizes": [one.facts() for one in found], **law, "runs": runs, "remark": note, "recipe": text})


def _require_room(
    sizes: Sequence[Sequence[str]], tried: int, lengths: Sequence[float], alpha: float | None, beta: float | None
) -> None:
    """Raise MismatchError for a ladder that no law can be fitted to, before anything is trained."""
    from pgolf_post.sizing.law import COEFFICIENTS, Observation, require_ladder

    of_size = [Observation("", 0, j + 1, 1.0, 1.0) for j in range(len(lengths))] * (1 + tried)
    runs = [replace(run, parameters=i + 1) for i in range(len(sizes)) for run in of_size]
    require_ladder(runs, len(COEFFICIENTS) + tried - (alpha is not None) - (beta is not None))
