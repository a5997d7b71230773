"""Options and steps of commands that choose among averages: the search's own, and scoring after fit's rounding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from pgolf_post.errors import SettingsError

if TYPE_CHECKING:
    from pgolf_post.average.search import Candidate, Search
    from pgolf_post.average.settings import SearchSettings
    from pgolf_post.checkpoint import Checkpoint
    from pgolf_post.data import DataFolder

F = TypeVar("F", bound=Callable[..., Any])

SEARCH_FLAGS = {
    "max_tokens": "--search-tokens",
    "tolerance": "--search-tolerance",
    "level": "--search-level",
    "seed": "--search-seed",
}
AFTER_FIT_TOKENS = 16384  # of statistics


def after_fit_options(function: F) -> F:
    """Add the options of scoring after fit's rounding."""
    tokens = click.option(
        "--calibration-tokens",
        type=click.IntRange(min=2),
        help=f"With --after-fit, training tokens of each average's statistics.  [default: {AFTER_FIT_TOKENS}]",
    )
    budget = click.option(
        "--after-fit",
        type=click.IntRange(min=1),
        metavar="BYTES",
        help="Choose by the loss that is expected after fit's rounding to an artifact of this many bytes.",
    )
    return budget(tokens(function))


def refuse_idle_tokens(after_fit: int | None, calibration_tokens: int | None) -> None:
    """Raise SettingsError for --calibration-tokens where nothing is rounded."""
    if calibration_tokens is not None and after_fit is None:
        raise SettingsError("--calibration-tokens does nothing without --after-fit")


def search_among(
    final: Checkpoint,
    candidates: list[Candidate],
    text: DataFolder,  # whose validation split is scored
    data: DataFolder,  # whose training split the statistics read
    settings: SearchSettings,
    after_fit: int | None = None,  # bytes
    calibration_tokens: int | None = None,
    allow: Sequence[str] = (),
) -> tuple[Search, dict[str, Any]]:
    """Search, print what was found, and return it with its JSON facts."""
    from pgolf_post.average.report import show_search
    from pgolf_post.average.search import search_blends
    from pgolf_post.calibrate import CalibrationSettings
    from pgolf_post.fit.after_fit import AfterFit
    from pgolf_post.fit.report import show_after_fit

    facts: dict[str, Any] = {}
    if after_fit is None:
        search = search_blends(final, candidates, text, settings, allow)
        show_search(search)
    else:
        after = AfterFit(data, after_fit, CalibrationSettings(tokens=calibration_tokens or AFTER_FIT_TOKENS))
        search = search_blends(final, candidates, text, settings, allow, after)
        show_search(search)
        show_after_fit(final, search, after)
        facts = {"after_fit": after.facts()}
    return search, {**search.facts(), "data_manifest_sha256": text.manifest_sha256, **facts}
