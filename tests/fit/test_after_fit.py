"""Averages scored after fit's rounding: the number is fit's own, and with many bytes it is the loss before rounding."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from pgolf_post.average.linear import linear_blend, save_blend
from pgolf_post.average.search import Candidate, Search, family, search_blends
from pgolf_post.average.settings import SearchSettings
from pgolf_post.calibrate import CalibrationSettings
from pgolf_post.checkpoint import Checkpoint
from pgolf_post.data import DataFolder
from pgolf_post.errors import SettingsError
from pgolf_post.families import load_module
from pgolf_post.fit.after_fit import ENOUGH, AfterFit
from pgolf_post.fit.artifact import fit
from pgolf_post.score.compare.expected import expected_score
from pgolf_post.score.plain import windows
from pgolf_post.score.spans import Span

CALIBRATION = CalibrationSettings(tokens=512)
ALL_STAY = SearchSettings(max_tokens=320, level=1 - 1e-12)  # so that all are scored on the same windows
FEW_BYTES, MANY_BYTES = 6_000, 20_000


def candidates_of(final: Checkpoint) -> list[Candidate]:
    """EMA, half of it with raw weights, and the mean of the warm-down."""
    named = {candidate.name: candidate for candidate in family(final)}
    return [named[name] for name in ("EMA", "50% EMA, 50% raw", "SWA of 3")]


Run = tuple[Checkpoint, Search, AfterFit]


def searched(final: Checkpoint, data: DataFolder, num_bytes: int) -> tuple[Search, AfterFit]:
    after = AfterFit(data, num_bytes, CALIBRATION)
    return search_blends(final, candidates_of(final), data, ALL_STAY, score=after), after


@pytest.fixture(scope="module")
def searched_run(tmp_path_factory: pytest.TempPathFactory, pico_run_original: Path, pico_data: DataFolder) -> Run:
    """A pico run's final checkpoint, and the first search after fit to few bytes there."""
    root = tmp_path_factory.mktemp("searched") / "checkpoints"
    shutil.copytree(pico_run_original, root, symlinks=True)
    final = Checkpoint.open(root / "latest")
    return final, *searched(final, pico_data, FEW_BYTES)


def test_a_number_is_that_of_fit_and_the_expected_loss_on_the_same_windows(
    searched_run: Run, pico_data: DataFolder
) -> None:
    _, search, after = searched_run
    candidate = search.candidates[1]
    saved, _ = save_blend(linear_blend(candidate.parts), "swa", pico_data, {})
    view, tokens = saved.load(), pico_data.tokens("val")
    artifact = fit(view, pico_data, FEW_BYTES, calibration=CALIBRATION, settings=ENOUGH)
    assert artifact.path.read_bytes() == after.averages[candidate.name].artifact.path.read_bytes()
    decoded = {name: torch.from_numpy(array) for name, array in artifact.decoded().tensors.items()}
    models = [load_module(view.config, tensors, "test") for tensors in (view.tensors, decoded)]
    spans = [Span(start, length, length) for start, length in windows(len(tokens), 16, "drop")]
    chosen = np.unique(candidate.scored.window)
    own = expected_score(models[0], models[1], tokens, pico_data.token_bytes("val", tokens), spans, chosen)
    assert own.bpb == pytest.approx(candidate.scored.bpb, rel=1e-9)
    one = after.averages[candidate.name]
    assert one.before_bpb + one.gap_bpb == pytest.approx(own.bpb, rel=1e-9)
    assert one.gap_bpb > 1e-4


def test_with_many_bytes_the_order_is_that_of_the_plain_search(
    pico_checkpoint: Checkpoint, pico_data: DataFolder
) -> None:
    plain = search_blends(pico_checkpoint, candidates_of(pico_checkpoint), pico_data, ALL_STAY)
    many, after = searched(pico_checkpoint, pico_data, MANY_BYTES)
    losses, expected = (np.array([c.scored.bpb for c in search.candidates]) for search in (plain, many))
    assert list(np.argsort(losses)) == list(np.argsort(expected))
    assert np.abs(losses - expected).max() < 1e-4 < np.diff(np.sort(losses)).min()
    assert [one.before_bpb for one in after.averages.values()] == pytest.approx(list(losses), rel=1e-6)


def test_a_search_goes_on_from_what_is_there(searched_run: Run, pico_data: DataFolder) -> None:
    final, first, after = searched_run
    again, after_again = searched(final, pico_data, FEW_BYTES)
    assert first.facts() == again.facts()
    assert not any(one.artifact.cached for one in after.averages.values())
    for one, other in zip(after.averages.values(), after_again.averages.values(), strict=True):
        assert other.artifact.cached
        assert one.disk_bytes == other.disk_bytes > one.artifact.num_bytes
        assert other.seconds["statistics"] == one.seconds["statistics"]


def test_no_score_is_made_of_bytes_that_hold_every_weight(pico_checkpoint: Checkpoint, pico_data: DataFolder) -> None:
    with pytest.raises(SettingsError, match="there is nothing to solve"):
        searched(pico_checkpoint, pico_data, 10**7)


def test_a_part_alone_keeps_its_results_itself(searched_run: Run, pico_data: DataFolder) -> None:
    final, _, after = searched_run
    artifact = fit(final.load("ema"), pico_data, FEW_BYTES, calibration=CALIBRATION, settings=ENOUGH)
    assert artifact.cached
    assert artifact.folder.samefile(after.averages["EMA"].artifact.folder)
