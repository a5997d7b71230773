"""Rows of lookup tables: what counts of little text let expect of other text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from pgolf_post.calibrate import CalibrationSettings, calibrate
from pgolf_post.data import DataFolder
from pgolf_post.fit.artifact import fit_artifact
from pgolf_post.fit.limits import fixed_bytes
from pgolf_post.fit.lookup_rows import expected_counts, expected_sums, likeliest_shape
from pgolf_post.fit.prepare import prepare
from pgolf_post.fit.sensitivity import sensitivity
from pgolf_post.fit.settings import FitSettings
from pgolf_post.fit.solve import WINDOW_BYTES
from pgolf_post.pack.artifact import read_artifact
from tests.conftest import pico_recipe
from trainer.run.loop import Trainer

COUNTED = FitSettings(lookup_frequency="counted")


def drawn(shape: float, mean: float, rows: int = 4000) -> tuple[Tensor, Tensor]:
    """Return frequencies of a gamma distribution and Poisson counts of them."""
    torch.manual_seed(1)
    frequencies = torch.distributions.Gamma(shape, shape / mean).sample((rows,)).double()
    return frequencies, torch.poisson(frequencies)


@pytest.mark.parametrize("shape", [0.2, 1.0, 4.0])
@pytest.mark.parametrize("mean", [0.7, 3.0])
def test_expected_counts_are_nearer_to_the_frequencies_than_counts(shape: float, mean: float) -> None:
    frequencies, counts = drawn(shape, mean)
    assert float(likeliest_shape(counts)) == pytest.approx(shape, rel=0.5)
    expected = expected_counts(counts)
    assert float(expected.sum()) == pytest.approx(float(counts.sum()))
    # The posterior mean's error is n̄/(n̄ + α) of the counts' own.
    error, of_counts = ((guess - frequencies).square().mean() for guess in (expected, counts))
    assert float(error / of_counts) == pytest.approx(mean / (mean + shape), rel=0.15)


def test_more_lookups_are_expected_of_rows_that_had_more_and_some_of_those_that_had_none() -> None:
    _, counts = drawn(0.5, 2.0)
    values = counts.unique()
    expected = torch.stack([expected_counts(counts)[counts == value][0] for value in values])
    assert (expected.diff() > 0).all()
    assert float(expected[0]) > 0


def test_rows_of_equal_frequency_are_expected_equal() -> None:
    torch.manual_seed(2)
    counts = torch.poisson(torch.full((4000,), 2.0, dtype=torch.float64))
    expected = expected_counts(counts)
    assert float(expected.max() / expected.min()) < 1.2


def test_much_text_is_taken_at_its_word() -> None:
    _, counts = drawn(0.5, 1e6, rows=50)
    torch.testing.assert_close(expected_counts(counts), counts, rtol=1e-2, atol=10)
    sums = counts * torch.linspace(0.5, 2, 50, dtype=torch.float64)
    torch.testing.assert_close(expected_sums(counts, sums), sums, rtol=1e-2, atol=100)


def test_lookups_that_cost_alike_cost_what_they_are_expected_to_number() -> None:
    _, counts = drawn(0.5, 2.0)
    torch.testing.assert_close(expected_sums(counts, 3 * counts), 3 * expected_counts(counts))
    assert torch.equal(expected_sums(torch.zeros(3), torch.zeros(3)), torch.zeros(3))


@pytest.mark.parametrize("tune_tokens", [0, 2048])
def test_a_table_of_bigrams_is_fitted_and_tuned(tmp_path: Path, pico_data: DataFolder, tune_tokens: int) -> None:
    features: dict[str, object] = {"bigram_buckets": 64, "bigram_dim": 8, "num_loops": 0}
    checkpoint = Trainer(pico_recipe(pico_data, tmp_path / "checkpoints", model=features)).run()
    view = checkpoint.load()
    settings = FitSettings(kappa_tokens=256, trellis_states=4, tune_tokens=tune_tokens)
    fitter = prepare(view, pico_data, CalibrationSettings(tokens=1024), settings)
    limit = fixed_bytes(fitter.builder) + fitter.builder.num_weights * 3 // 8 + WINDOW_BYTES // 2
    artifact = fit_artifact(fitter, limit, "rans")
    assert ("fine_tuned" in artifact.meta) == bool(tune_tokens)
    decoded = read_artifact(artifact.path).tensors
    assert {name: array.shape for name, array in decoded.items()} == {
        name: tuple(tensor.shape) for name, tensor in view.tensors.items()
    }
    # Rows that the text did not look up are as sensitive as their expected lookups.
    table = "bigram.embed.weight"
    stats = calibrate(view, pico_data, CalibrationSettings(tokens=256, fisher=True))
    assert stats.fisher is not None
    unseen = stats.fisher.lookup_counts[table] == 0
    assert 0 < int(unseen.sum()) < 64
    found, as_counted = (sensitivity(table, None, stats, chosen).rows for chosen in (settings, COUNTED))
    assert (found[unseen] > as_counted[unseen]).all()
