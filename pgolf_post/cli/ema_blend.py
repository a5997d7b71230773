"""`pgolf-post ema-blend`: moving averages of any length, made after the run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pgolf_post.average.settings import MAX_ERROR, SearchSettings
from pgolf_post.base.numbers import FiniteFloat, Numbers
from pgolf_post.base.progress import print_json
from pgolf_post.cli.averaging import after_fit_options, refuse_idle_tokens, search_among
from pgolf_post.cli.common import (
    checkpoint_argument,
    data_option,
    find_checkpoint,
    find_data,
    given_settings,
    json_option,
    quiet_option,
    settings_options,
    threads_option,
)
from pgolf_post.errors import SettingsError

if TYPE_CHECKING:
    from pgolf_post.average.profiles import Length
    from pgolf_post.average.search import Candidate
    from pgolf_post.checkpoint import Checkpoint


@click.command("ema-blend")
@checkpoint_argument
@click.option("--sigma", "sigmas", type=Numbers(), help="Power-function widths, as shares of the run: 0.05,0.10,0.15.")
@click.option("--half-life-steps", "half_lives", type=Numbers(), help="Exponential half-lives, in steps: 50,100.")
@click.option("--end-step", type=int, help="End the averages at this step.  [default: CHECKPOINT's]")
@click.option(
    "--max-error",
    type=FiniteFloat(),
    default=MAX_ERROR,
    show_default=True,
    help="Refuse averages whose profile has a larger reconstruction error, as a share of its norm.",
)
@after_fit_options
@settings_options(SearchSettings, {"max_tokens": "--search-tokens"})
@data_option
@threads_option
@quiet_option
@json_option
def command(
    checkpoint: Path | None,
    sigmas: tuple[float, ...] | None,
    half_lives: tuple[float, ...] | None,
    end_step: int | None,
    max_error: float,
    after_fit: int | None,
    calibration_tokens: int | None,
    max_tokens: int | None,
    data_dir: Path | None,
    as_json: bool,
) -> None:
    """Synthesise moving averages of CHECKPOINT's run from the snapshots it kept (optim.power_ema_sigmas).

    Each length becomes a checkpoint folder beside the run's own, with the snapshots' shares and the reconstruction
    error recorded, and its bpb measured as the run's checkpoints were.

    \b
    pgolf-post ema-blend --sigma 0.05,0.10,0.15
    pgolf-post ema-blend --sigma 0.05,0.10,0.15 --after-fit 16000000

    With --after-fit the averages and CHECKPOINT's own weights are compared as `swa-blend --search --after-fit` does it:
    by the loss expected of their artifacts of so many bytes, on the same windows, dropping those that cannot win.
    """
    from pgolf_post.average.posthoc import posthoc_ema
    from pgolf_post.average.profiles import ExponentialLength, PowerLength
    from pgolf_post.average.report import show_lengths
    from pgolf_post.ledger.recording import record

    lengths: list[Length] = [*map(PowerLength, sigmas or ()), *map(ExponentialLength, half_lives or ())]
    if not lengths:
        raise click.UsageError("say which lengths: --sigma 0.05,0.10 or --half-life-steps 50,100")
    refuse_idle_tokens(after_fit, calibration_tokens)
    if max_tokens is not None and after_fit is None:
        raise SettingsError("--search-tokens does nothing without --after-fit")
    settings = given_settings(SearchSettings, {"max_tokens": max_tokens}, "ema-blend --after-fit")
    started = time.perf_counter()
    final = find_checkpoint(checkpoint)
    data = find_data(final, data_dir)
    made = [(str(length), *posthoc_ema(final, length, data, end_step, max_error)) for length in lengths]
    show_lengths(final, [(label, average) for label, average, _ in made])
    chosen = {}
    if after_fit is not None:
        candidates = _candidates(final, [(label, average) for label, average, _ in made])
        _, chosen["search"] = search_among(final, candidates, data, data, settings, after_fit, calibration_tokens)
    seconds = round(time.perf_counter() - started, 3)
    record(*(blend.path for _, blend, _ in made), seconds=seconds)
    if as_json:
        print_json({"averages": [facts(*one) for one in made], **chosen, "seconds": seconds})


def _candidates(final: Checkpoint, averages: Sequence[tuple[str, Checkpoint]]) -> list[Candidate]:
    """Return the checkpoint's own weights, the control, and averages, each as it was saved."""
    from pgolf_post.average.linear import Part
    from pgolf_post.average.search import Candidate

    own = final.view_name(None)
    control = Candidate("EMA" if own == "ema" else own, 0.0, [Part(final, own, 1.0)])
    return [control, *(Candidate(label, 0.0, [Part(average, "raw", 1.0)]) for label, average in averages)]


def facts(label: str, blend: Checkpoint, cached: bool) -> dict[str, Any]:
    """Return one average as JSON facts."""
    metric, meta = blend.meta["views"]["raw"]["metric"], blend.meta
    return {
        "average": label,
        "checkpoint": str(blend.path),
        "checkpoint_id": meta["id"],
        **{key: metric[key] for key in ("bpb", "nats", "tokens", "bytes")},
        **{key: meta[key] for key in ("ema", "reconstruction_error", "amplification", "no_op")},
        "cached": cached,
    }
