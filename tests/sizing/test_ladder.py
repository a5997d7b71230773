"""The sizes of a ladder: what is no change, or no other size, is refused before anything is trained."""

from __future__ import annotations

from pathlib import Path

import pytest

from pgolf_post.checkpoint import View
from pgolf_post.data import DataFolder
from pgolf_post.errors import SettingsError
from pgolf_post.fit.settings import FitSettings
from pgolf_post.sizing.ladder import LadderSettings, climb, measure_gaps


@pytest.mark.parametrize(
    ("last", "named"),
    [
        ("nope", "--set 'nope': expected key=value"),
        ("model.model_dim=8", 'size 3, --size "model.model_dim=8", is the same recipe as size 1'),
        ("model.model_dim=16", 'size 3, --size "model.model_dim=16", is the same recipe as size 2'),
    ],
)
def test_a_size_that_is_no_other_is_refused_before_anything_is_trained(tmp_path: Path, last: str, named: str) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("[model]\nmodel_dim = 16\n")
    sizes = (("model.model_dim=8",), (), (last,))
    with pytest.raises(SettingsError) as caught:
        climb(LadderSettings(recipe, sizes, (1.0, 2.0), (2.0, 3.0)), tmp_path / "checkpoints")
    assert str(caught.value).startswith(named)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(("bits", "other"), [(0.5, "higher"), (64.0, "lower")])
def test_a_rate_that_no_artifact_has_is_named_as_the_option_that_it_is(
    tmp_path: Path, view: View, pico_data: DataFolder, bits: float, other: str
) -> None:
    fit = FitSettings(kappa="off", trellis_states=0)
    settings = LadderSettings(tmp_path / "recipe.toml", ((),), (1.0,), (bits,), 64, 64, fit)
    with pytest.raises(SettingsError, match=rf"^--bits {bits:g}: [\d,]+ bytes") as caught:
        measure_gaps(view, pico_data, settings)
    assert caught.value.hint == f"--bits with a {other} rate in its place"
