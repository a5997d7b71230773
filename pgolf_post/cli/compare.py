"""`pgolf-post compare`: is A better than B, by how much, and how sure is that."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from click.core import ParameterSource

from pgolf_post.base.numbers import FiniteFloat
from pgolf_post.base.progress import print_json, print_table, say
from pgolf_post.cli.common import (
    data_option,
    derived_option,
    dollars_option,
    json_option,
    quiet_option,
    split_view,
    threads_option,
)
from pgolf_post.cli.scoring import (
    PROTOCOL_NAMES,
    Opened,
    breakdown_option,
    open_scored,
    parse_protocol,
    protocol_options,
)
from pgolf_post.errors import MismatchError

if TYPE_CHECKING:
    from pgolf_post.score.bpb import Score
    from pgolf_post.score.compare.comparison import Comparison
    from pgolf_post.score.compare.expected import ExpectedWindows
    from pgolf_post.score.pool import ModelPool
    from pgolf_post.score.stage import StoredScore

IDLE = {  # way of comparing → options that it does not read
    "paired": ("bytes_per_token", "variant", "reference"),
    "record": ("level", "seed", "reference", "kinds", "control_protocol"),
    "until_ci": ("bytes_per_token", "variant", "compiled", "kinds", "control_protocol"),
}


@click.command("compare")
@click.argument("candidate")
@click.argument("control")
@data_option
@derived_option
@protocol_options
@click.option(
    "--control-protocol",
    type=click.Choice([name for name in PROTOCOL_NAMES if name != "ttt"]),
    help="Score CONTROL by this protocol instead, on the same text: shows what test-time training wins.",
)
@breakdown_option
@click.option(
    "--record", is_flag=True, help="Apply the challenge's rule to groups of seeds, each a comma-separated list."
)
@click.option(
    "--until-ci",
    type=FiniteFloat(min=0, min_open=True),
    help="Score random windows until the difference is known to ± this many bpb.",
)
@click.option(
    "--reference",
    metavar="CKPT",
    help="With --until-ci, average over this checkpoint's predicted distribution instead of the actual next tokens.",
)
@click.option(
    "--level",
    type=FiniteFloat(0.5, 1, True, True),
    default=0.95,
    show_default=True,
    help="Confidence level of the intervals.",
)
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the bootstrap and of sampling."
)
@click.option("--bytes-per-token", type=FiniteFloat(), help="Bytes of text per token, for --record with numbers.")
@click.option(
    "--variant",
    type=click.Choice(["sp1024", "sp4096", "sp8192", "caseops"]),
    help="Take --bytes-per-token from a published tokenization of the validation text.",
)
@click.option("--compile", "compiled", is_flag=True, help="Compile one model for both with torch.compile; not for ttt.")
@dollars_option
@threads_option
@quiet_option
@json_option
def command(candidate: str, control: str, dollars_per_hour: float | None, as_json: bool, **options: Any) -> None:
    """Measure the bits per byte of CANDIDATE less those of CONTROL; negative is better.

    \b
    pgolf-post compare ARTIFACT CKPT                                 paired by document: t, bootstrap, sign test
    pgolf-post compare CKPT:ema CKPT:raw                             two sets of weights of one folder
    pgolf-post compare ARTIFACT CKPT --breakdown token-class,repeat  what did quantization break?
    pgolf-post compare CKPT CKPT --protocol ttt --ttt lora --control-protocol plain --breakdown document
    pgolf-post compare A B --until-ci 0.0003                         as little text as the question needs
    pgolf-post compare A B --until-ci 0.0001 --reference CKPT        far less yet, for two quantizations of CKPT
    pgolf-post compare --record 1.0791,1.0802,1.0799 1.0812,1.0810,1.0808 --variant sp8192
    pgolf-post compare --record A1,A2,A3 B1,B2,B3                    the same from checkpoints or artifacts

    Each is a checkpoint or an artifact. A checkpoint's weights are its EMA where it has one, else raw; :ema, :raw or
    :swa after its path names others. Cached scores are read from the cache. --until-ci scores plain windows in random
    order. It stops when the whole text's difference is known to that many bpb, or is known not to be zero; the interval
    allows for the repeated looks. With --reference, the difference is averaged over CKPT's predicted distribution
    instead of the actual next tokens, which removes most sampling noise. That is right as far as CKPT models the text
    well; a test on the same windows says so if not.
    """
    from pgolf_post.ledger.comparison import comparison_row
    from pgolf_post.ledger.recording import record

    started = time.perf_counter()
    if options["record"] and options["until_ci"]:
        raise click.UsageError("--record compares groups of seeds, --until-ci two models; choose one")
    way = "record" if options["record"] else ("until_ci" if options["until_ci"] else "paired")
    _refuse_idle(way)
    work = {"record": _record, "until_ci": _screen, "paired": _paired}[way]
    facts, scored = work(candidate, control, options)
    seconds = round(time.perf_counter() - started, 3)
    record(
        *scored,
        rows=lambda: [comparison_row(candidate, control, facts, scored, options, seconds)],
        dollars_per_hour=dollars_per_hour,
        seconds=seconds,
    )
    if as_json:
        print_json({"candidate": candidate, "control": control, **facts, "seconds": seconds})


Compared = tuple[dict[str, Any], list[Path]]  # the answer, and the folders of the scores it is made of


def _refuse_idle(way: str) -> None:
    """Raise UsageError for options that this way of comparing would pass over in silence."""
    context = click.get_current_context()
    given = [name for name in IDLE[way] if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    if given:
        flags = [parameter.opts[0] for parameter in context.command.params if parameter.name in given]
        what = {"paired": "a paired comparison", "record": "--record", "until_ci": "--until-ci"}[way]
        raise click.UsageError(f"{what} does not read {', '.join(flags)}; leave out what would do nothing")


def _open(text: str, options: dict[str, Any]) -> Opened:
    from pgolf_post.score.phase_times import PhaseTimes

    path, view = split_view(text)
    return open_scored(path, view, options["data_dir"], PhaseTimes())


def _score(opened: Opened, options: dict[str, Any], pool: ModelPool) -> StoredScore:
    protocol = parse_protocol(options, opened.config, "compare")
    return opened.score(protocol, pool=pool, breakdown=bool(options["kinds"]))


def _scores(names: list[str], options: dict[str, Any]) -> tuple[list[Score], list[Path]]:
    """Return scores of several paths and their folders, with one model for all that share a config."""
    from pgolf_post.score.pool import ModelPool

    pool = ModelPool(options["compiled"])
    stored = [_score(_open(name, options), options, pool) for name in names]
    return [score.sums for score in stored], [score.folder for score in stored]


def _paired(candidate: str, control: str, options: dict[str, Any]) -> Compared:
    from pgolf_post.score.compare.comparison import compare
    from pgolf_post.score.compare.report import HEADER, paired_rows
    from pgolf_post.score.pool import ModelPool

    pool = ModelPool(options["compiled"])
    first = _score(_open(candidate, options), options, pool)
    second = _score(_open(control, options), _control_options(options), pool)
    comparison = compare(first, second, level=options["level"], seed=options["seed"])
    print_table(f"{candidate} against {control}", HEADER, paired_rows(comparison))
    bins = _compare_bins(first, second, comparison, options["kinds"]) if options["kinds"] else {}
    return {**comparison.facts(), **bins}, [first.folder, second.folder]


def _control_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that the control is scored by; those that --control-protocol does not read are left out."""
    kind = options["control_protocol"]
    if kind is None:
        return options
    stride = options["stride"] if kind == "sliding" else None
    return {**options, "protocol": kind, "stride": stride, "ttt": None, "overrides": ()}


def _compare_bins(
    candidate: StoredScore, control: StoredScore, comparison: Comparison, kinds: tuple[str, ...]
) -> dict[str, Any]:
    """Print the paired difference of every bin, and return it as JSON facts."""
    from pgolf_post.score.breakdown.difference import ScoreSums, bin_differences
    from pgolf_post.score.breakdown.kinds import KINDS
    from pgolf_post.score.breakdown.report import DIFFERENCES_HEADER, difference_rows, summary_line

    mine, theirs = (ScoreSums(one.sums, one.breakdown) for one in (candidate, control))
    differences = {kind: bin_differences(mine, theirs, kind, comparison.by_t.level) for kind in kinds}
    for kind, rows in differences.items():
        print_table(f"difference by {KINDS[kind].title}", DIFFERENCES_HEADER, difference_rows(rows, kind))
    for name, one in (("candidate", candidate), ("control", control)):
        say(f"{name}: {summary_line(one.breakdown)}")
    return {"bins": {kind: [one.facts() for one in rows] for kind, rows in differences.items()}}


def _record(candidate: str, control: str, options: dict[str, Any]) -> Compared:
    from pgolf_post.score.compare.record import record_rule
    from pgolf_post.score.compare.report import HEADER, record_rows

    first, first_ratio, folders = _group(candidate, options)
    second, second_ratio, more_folders = _group(control, options)
    ratio = _bytes_per_token(options) or first_ratio or second_ratio
    if ratio is None:
        raise click.UsageError("0.005 nats per token are how many bpb? pass --variant or --bytes-per-token")
    verdict = record_rule(first, second, ratio)
    print_table(f"{candidate} against {control}", HEADER, record_rows(first, second, verdict))
    answer = {"candidate_bpb": first.tolist(), "control_bpb": second.tolist(), **verdict.facts()}
    return answer, [*folders, *more_folders]


def _bytes_per_token(options: dict[str, Any]) -> float | None:
    from pgolf_post.score.compare.record import BYTES_PER_TOKEN

    if options["variant"]:
        return BYTES_PER_TOKEN[options["variant"]]
    given: float | None = options["bytes_per_token"]
    if given is not None and not 0 < given < math.inf:
        raise click.UsageError(f"--bytes-per-token {given:g}: it must be positive")
    return given


def _group(
    text: str, options: dict[str, Any]
) -> tuple[np.ndarray, float | None, list[Path]]:  # bpb of seeds, bytes per token, folders of their scores
    """Read a comma-separated group of numbers, or of paths that are scored."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    try:
        values = [float(part) for part in parts]
    except ValueError:
        scores, folders = _scores(parts, options)
    else:
        if not all(0 < value < math.inf for value in values):
            raise click.UsageError(f"{text}: bits per byte are positive numbers")
        return np.array(values), None, []
    return np.array([score.bpb for score in scores]), scores[0].bytes / scores[0].tokens, folders


def _screen(candidate: str, control: str, options: dict[str, Any]) -> Compared:
    from pgolf_post.base.ranks import ALONE
    from pgolf_post.families import load_module
    from pgolf_post.score.compare.expected import ExpectedWindows
    from pgolf_post.score.compare.report import HEADER, screening_rows
    from pgolf_post.score.compare.screen import ScreenSettings, screen
    from pgolf_post.score.compare.windows import bytes_of_windows, window_scorer
    from pgolf_post.score.protocols import folder_text, protocol_spans
    from pgolf_post.score.spans import num_targets
    from pgolf_post.settings import parse_settings

    # candidate, control and perhaps a reference on one text, by a protocol that does not learn
    names = [name for name in (candidate, control, options["reference"]) if name]
    opened = [_open(name, options) for name in names]
    protocol = parse_protocol(options, opened[0].config, "compare")
    if protocol.protocol == "ttt":
        raise click.UsageError("--until-ci samples windows; test-time training needs the whole text")
    if options["reference"] and protocol.precision != "fp32":
        raise click.UsageError(
            "--reference measures divergences that bf16's rounding would drown; leave out --precision"
        )
    if len({one.data.manifest_sha256 for one in opened}) > 1:
        raise MismatchError(f"{' and '.join(names)} belong to different data", hint="pass --data FOLDER")
    tokens, token_bytes = folder_text(opened[0].data, protocol)
    first, second, *reference = (load_module(one.config, one.tensors, one.name).to(ALONE.device) for one in opened)
    targets = num_targets(len(tokens), protocol.seq_len, protocol.tail)
    text = (tokens, token_bytes, protocol_spans(protocol, targets))

    # windows in random order until the difference is known
    wanted = {"half_width_bpb": options["until_ci"], "level": options["level"], "seed": options["seed"]}
    settings = parse_settings(ScreenSettings, wanted, "compare")
    expected = ExpectedWindows(reference[0], first, second, *text) if reference else None
    all_bytes = bytes_of_windows(text[2], token_bytes)
    screening = screen(
        expected or window_scorer(first, second, *text, protocol.precision), all_bytes, targets, settings
    )

    facts = _expected_facts(expected, all_bytes, options) if expected else {}
    print_table(f"{candidate} against {control}", HEADER, screening_rows(screening, settings.level, facts))
    if facts and abs(facts["surprise_bpb"]) > facts["surprise_half_bpb"]:
        say(
            f"the measured difference is further from the one that {facts['reference']} expects than chance allows: "
            "the expectation misleads here; compare without --reference"
        )
    return {**screening.facts(), **facts}, []


def _expected_facts(expected: ExpectedWindows, all_bytes: np.ndarray, options: dict[str, Any]) -> dict[str, Any]:
    """Return what goes with an expected difference: divergences, the measured difference, and its surprise."""
    level = options["level"]
    candidate, control = expected.divergences(all_bytes, level)
    intervals = {"candidate_divergence": candidate, "control_divergence": control}
    intervals |= {"measured": expected.measured(all_bytes, level), "surprise": expected.surprise(all_bytes, level)}
    facts: dict[str, Any] = {"reference": options["reference"]}
    for name, interval in intervals.items():
        facts |= {f"{name}_bpb": interval.bpb, f"{name}_half_bpb": interval.half}
    return facts
