"""`pgolf-post compare`: is A better than B, by how much, and how sure is that."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from click.core import ParameterSource

from pgolf_post.base.progress import print_json, print_table, say
from pgolf_post.cli.common import data_option, dollars_option, json_option, split_view
from pgolf_post.cli.scoring import Opened, open_subject, parse_protocol, protocol_options
from pgolf_post.errors import MismatchError

if TYPE_CHECKING:
    from pgolf_post.score.bpb import Score
    from pgolf_post.score.compare.expected import ExpectedWindows
    from pgolf_post.score.compare.screen import Screening


IDLE = {  # way of comparing → options that it does not read
    "paired": ("bytes_per_token", "variant", "reference"),
    "record": ("level", "seed", "reference"),
    "until_ci": ("bytes_per_token", "variant", "compiled"),
}


@click.command("compare")
@click.argument("candidate")
@click.argument("control")
@data_option
@protocol_options
@click.option("--record", is_flag=True, help="The challenge's rule over groups of seeds (comma-separated).")
@click.option("--until-ci", type=click.FloatRange(min=0, min_open=True), help="Screen until known to ± so many bpb.")
@click.option("--reference", metavar="CKPT", help="--until-ci: the difference that this checkpoint expects.")
@click.option(
    "--level", type=click.FloatRange(0.5, 1, True, True), default=0.95, show_default=True, help="Of the intervals."
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of bootstrap and sampling.")
@click.option("--bytes-per-token", type=float, help="--record with numbers: bytes of text per token.")
@click.option("--variant", type=click.Choice(["sp1024", "sp4096", "sp8192", "caseops"]), help="… or a published one.")
@click.option("--compile", "compiled", is_flag=True, help="torch.compile one model for both (not for ttt).")
@dollars_option
@json_option
def command(candidate: str, control: str, dollars_per_hour: float | None, as_json: bool, **options: Any) -> None:
    """The difference in bits per byte of CANDIDATE (a checkpoint or an artifact) against CONTROL; negative is better.

    \b
    pgolf-post compare ARTIFACT CKPT                                 paired by document: t, bootstrap, sign test
    pgolf-post compare CKPT:ema CKPT:raw                             two sets of weights of one folder
    pgolf-post compare A B --until-ci 0.0003                         as little text as the question needs
    pgolf-post compare A B --until-ci 0.0001 --reference CKPT        far less yet, for two quantizations of CKPT
    pgolf-post compare --record 1.0791,1.0802,1.0799 1.0812,1.0810,1.0808 --variant sp8192
    pgolf-post compare --record A1,A2,A3 B1,B2,B3                    the same from checkpoints or artifacts

    A checkpoint's weights are its EMA where it has one, else raw; :ema, :raw or :swa after its path names others.
    Scores are read from the cache where they are there. --until-ci draws plain windows at random and stops when the
    whole text's difference is known to so many bpb, or to be no zero; looking often is paid for in its interval. With
    --reference that difference is not measured on the text's words but expected over all that CKPT thinks possible:
    the same but for the luck of the words, where CKPT is a good model of the text, which is tested on the way.
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


def _refuse_idle(way: str) -> None:
    """Raise UsageError for options that this way of comparing would pass over in silence."""
    context = click.get_current_context()
    given = [name for name in IDLE[way] if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    if given:
        flags = [parameter.opts[0] for parameter in context.command.params if parameter.name in given]
        what = {"paired": "a paired comparison", "record": "--record", "until_ci": "--until-ci"}[way]
        raise click.UsageError(f"{what} does not read {', '.join(flags)}; leave out what would do nothing")


def _open(text: str, options: dict[str, Any]) -> Opened:
    path, view = split_view(text)
    return open_subject(path, view, options["data_dir"])


Compared = tuple[dict[str, Any], list[Path]]  # the answer, and the folders of the scores it is made of


def _score(opened: Opened, options: dict[str, Any], pool: Any) -> tuple[Score, Path]:
    from pgolf_post.score.cached import load_score
    from pgolf_post.score.session import Session

    protocol = parse_protocol(options, opened.config, "compare")
    found, _ = opened.score(protocol, False, Session(), pool)
    return load_score(found), Path(found["folder"])


def _scores(names: list[str], options: dict[str, Any]) -> tuple[list[Score], list[Path]]:
    """Scores of several paths and their folders, with one model for all that share a config."""
    from pgolf_post.score.pool import ModelPool

    pool = ModelPool(options["compiled"])
    found = [_score(_open(name, options), options, pool) for name in names]
    return [score for score, _ in found], [folder for _, folder in found]


def _paired(candidate: str, control: str, options: dict[str, Any]) -> Compared:
    from pgolf_post.score.compare.compare import paired_documents, sign_test
    from pgolf_post.score.compare.paired import bootstrap_interval, t_interval

    (first, second), folders = _scores([candidate, control], options)
    clusters = paired_documents(first, second)
    by_t = t_interval(clusters, options["level"])
    by_bootstrap = bootstrap_interval(clusters, options["level"], seed=options["seed"])
    signs = sign_test(clusters)
    percent = f"{100 * options['level']:g} %"
    rows = [("candidate, bpb", f"{first.bpb:.6f}"), ("control, bpb", f"{second.bpb:.6f}")]
    rows += [("difference", f"{by_t.bpb:+.6f}"), (f"t interval, {percent}", f"{by_t.low:+.6f} … {by_t.high:+.6f}")]
    rows += [(f"bootstrap over documents, {percent}", f"{by_bootstrap.low:+.6f} … {by_bootstrap.high:+.6f}")]
    rows += [("documents better / worse", f"{signs.better:,} / {signs.worse:,}"), ("sign test, p", f"{signs.p:.2g}")]
    rows += [("documents (as many equal ones)", f"{by_t.clusters:,} ({by_t.effective_clusters:.0f})")]
    print_table(f"{candidate} against {control}", ("", "value"), rows)
    resampled = {"bootstrap_low_bpb": by_bootstrap.low, "bootstrap_high_bpb": by_bootstrap.high}
    finite = {key: value for key, value in resampled.items() if np.isfinite(value)}
    sign = {"better": signs.better, "worse": signs.worse, "sign_p": signs.p}
    return {"bpb": first.bpb, "control_bpb": second.bpb, **by_t.facts(), **finite, **sign}, folders


def _record(candidate: str, control: str, options: dict[str, Any]) -> Compared:
    from pgolf_post.score.compare.compare import RECORD_MARGIN_NATS, record_rule

    first, first_ratio, folders = _group(candidate, options)
    second, second_ratio, more_folders = _group(control, options)
    ratio = _bytes_per_token(options) or first_ratio or second_ratio
    if ratio is None:
        raise click.UsageError("0.005 nats per token are how many bpb? pass --variant or --bytes-per-token")
    verdict = record_rule(first, second, ratio)
    zero, margin = verdict.against_zero, verdict.against_margin
    rows = [
        (f"{name}, mean of {len(g)}", f"{g.mean():.7f} ± {g.std(ddof=1):.7f}")
        for name, g in (
            ("candidate", first),
            ("control", second),
        )
    ]
    rows += [("difference, bpb", f"{zero.difference:+.7f}")]
    rows += [("difference, nats per token", f"{zero.difference * np.log(2) * ratio:+.6f}")]
    rows += [("Welch t, degrees of freedom", f"{zero.t:.2f}, {zero.degrees:.2f}"), ("p, one-sided", f"{zero.p:.4f}")]
    rows += [(f"p that it is better by {RECORD_MARGIN_NATS} nats ({margin.margin:.5f} bpb)", f"{margin.p:.4f}")]
    rows += [("three seeds each", "yes" if verdict.enough_seeds else "no")]
    rows += [("a record by the rule", "yes" if verdict.is_record else "no")]
    print_table(f"{candidate} against {control}", ("", "value"), rows)
    answer = {"candidate_bpb": first.tolist(), "control_bpb": second.tolist(), **verdict.facts()}
    return answer, [*folders, *more_folders]


def _bytes_per_token(options: dict[str, Any]) -> float | None:
    from pgolf_post.score.compare.compare import BYTES_PER_TOKEN

    if options["variant"]:
        return BYTES_PER_TOKEN[options["variant"]]
    given: float | None = options["bytes_per_token"]
    if given is not None and not 0 < given < math.inf:
        raise click.UsageError(f"--bytes-per-token {given:g}: it must be positive")
    return given


def _group(
    text: str, options: dict[str, Any]
) -> tuple[np.ndarray, float | None, list[Path]]:  # bpb of seeds, bytes per token, folders of their scores
    """A comma-separated group of numbers, or of paths that are scored."""
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
    from pgolf_post.families import load_module
    from pgolf_post.score.compare.expected import ExpectedWindows
    from pgolf_post.score.compare.screen import ScreenSettings, bytes_of_windows, screen, window_scorer
    from pgolf_post.score.protocols import folder_text, protocol_spans
    from pgolf_post.score.spans import num_targets
    from pgolf_post.settings import parse_settings

    names = [name for name in (candidate, control, options["reference"]) if name]
    opened = [_open(name, options) for name in names]
    protocol = parse_protocol(options, opened[0].config, "compare")
    if protocol.protocol == "ttt":
        raise click.UsageError("--until-ci samples windows; test-time training needs the whole text")
    if len({some.data.manifest_sha256 for some in opened}) > 1:
        raise MismatchError(f"{' and '.join(names)} belong to different data", hint="pass --data FOLDER")
    tokens, token_bytes = folder_text(opened[0].data, protocol)
    first, second, *reference = (load_module(some.config, some.tensors(), some.name) for some in opened)
    targets = num_targets(len(tokens), protocol.seq_len, protocol.tail)
    spans = protocol_spans(protocol, targets)
    wanted = {"half_width_bpb": options["until_ci"], "level": options["level"], "seed": options["seed"]}
    settings = parse_settings(ScreenSettings, wanted, "compare")
    text = (tokens, token_bytes, spans)
    expected = ExpectedWindows(reference[0], first, second, *text) if reference else None
    all_bytes = bytes_of_windows(spans, token_bytes)
    found = screen(expected or window_scorer(first, second, *text), all_bytes, targets, settings)
    facts = _expected_facts(expected, all_bytes, options) if expected else {}
    _show_screening(f"{candidate} against {control}", found, settings.level, facts)
    return {**found.facts(), **facts}, []


def _show_screening(title: str, found: Screening, level: float, facts: dict[str, Any]) -> None:
    """The table; `facts` are what goes with an expected difference, empty for a measured one."""
    last, kind = found.last, "expected difference" if facts else "difference"
    rows = [(f"{kind}, bpb", f"{last.bpb:+.6f}")]
    rows += [(f"interval, {100 * level:g} %", f"{found.low:+.6f} … {found.high:+.6f}")]
    rows += _expected_rows(facts) if facts else []
    share = f"{100 * last.tokens / found.total_tokens:.1f} %"
    rows += [("tokens", f"{last.tokens:,} of {found.total_tokens:,} ({share})")]
    rows += [("windows, looks", f"{last.windows:,}, {len(found.looks):,}")]
    print_table(title, ("", "value"), [*rows, ("stopped because", found.reason)])
    if facts and abs(facts["surprise_bpb"]) > facts["surprise_half_bpb"]:
        say(
            f"what was measured differs from what {facts['reference']} expects by more than chance: "
            "its expectation misleads here; compare without --reference"
        )


def _expected_facts(expected: ExpectedWindows, all_bytes: np.ndarray, options: dict[str, Any]) -> dict[str, Any]:
    """What goes with an expected difference: divergences, what was measured, and how far that is from it."""
    level = options["level"]
    candidate, control = expected.divergences(all_bytes, level)
    found = {"candidate_divergence": candidate, "control_divergence": control}
    found |= {"measured": expected.measured(all_bytes, level), "surprise": expected.surprise(all_bytes, level)}
    facts: dict[str, Any] = {"reference": options["reference"]}
    for name, interval in found.items():
        facts |= {f"{name}_bpb": interval.bpb, f"{name}_half_bpb": interval.half}
    return facts


def _expected_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    def shown(name: str, sign: str = "+") -> str:
        return f"{facts[f'{name}_bpb']:{sign}.6f} ± {facts[f'{name}_half_bpb']:.6f}"

    return [
        ("candidate's divergence from the reference, bpb", shown("candidate_divergence", "")),
        ("control's", shown("control_divergence", "")),
        ("measured on the same windows", shown("measured")),
        ("measured less expected; by chance up to", shown("surprise")),
    ]
