"""The sizes of a ladder: what is no change, or no other size, is refused before anything is trained."""

from __future__ import annotations

from pathlib import Path

import pytest

from pgolf_post.checkpoint import Checkpoint, View
from pgolf_post.data import DataFolder
from pgolf_post.errors import SettingsError
from pgolf_post.fit.settings import FitSettings
from pgolf_post.sizing.ladder import LadderSettings, climb, measure_gaps, num_weights
from pgolf_post.sizing.recipes import require_different, require_trainable
from pgolf_post.sizing.text import Texts
from tests.conftest import pico_recipe, write_recipe


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


def test_nothing_is_trained_before_every_recipe_is_read(tmp_path: Path) -> None:
    read: list[object] = []

    def refuse(*asked: object) -> Texts:
        read.append(asked[1:3])
        raise SettingsError("size 2: no such key")

    def never(*asked: object) -> Checkpoint:
        raise AssertionError("trained")

    settings = LadderSettings(tmp_path / "recipe.toml", ((), ("a=1",)), (1.0,), (2.0, 3.0), tried=(("b=2",),))
    with pytest.raises(SettingsError, match="size 2"):
        climb(settings, tmp_path / "checkpoints", never, refuse)
    assert read == [(settings.sizes, settings.tried)]


def test_every_size_is_trained_as_it_is_and_in_each_variant(tmp_path: Path) -> None:
    settings = LadderSettings(tmp_path / "r.toml", (("model.a=1",), ("model.a=2",)), (1.0,), (2.0,), tried=(("b=2",),))
    assert settings.trees == {
        ("a=1", "the recipe"): ("model.a=1",),
        ("a=1", "b=2"): ("model.a=1", "b=2"),
        ("a=2", "the recipe"): ("model.a=2",),
        ("a=2", "b=2"): ("model.a=2", "b=2"),
    }


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("model.no_such=1", r'^size 1, --size "model.no_such=1": .*no_such'),
        pytest.param("model.num_heads=5", r'^size 1, --size "model.num_heads=5": .*5', marks=pytest.mark.long),
    ],
)
def test_a_recipe_that_the_trainer_refuses_is_refused_with_its_reason(
    tmp_path: Path, pico_data: DataFolder, change: str, words: str
) -> None:
    recipe = write_recipe(pico_recipe(pico_data, tmp_path / "checkpoints"), tmp_path / "pico.toml")
    with pytest.raises(SettingsError, match=words):
        require_trainable(recipe, [(change,)], (), 64, tmp_path / "ladder")
    assert not list((tmp_path / "ladder").iterdir())


def test_a_variant_that_is_the_recipe_itself_is_refused(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("[model]\nmodel_dim = 16\n")
    with pytest.raises(SettingsError, match=r'with --try "model\.model_dim=16", is the same recipe as size 1'):
        require_different(recipe, [()], [("model.model_dim=16",)])


def test_weights_are_those_that_rounding_stores(view: View) -> None:
    by_shape = sum(tensor.numel() for tensor in view.tensors.values() if tensor.ndim == 2)
    sites = [name for site in view.family.sites(view.module) for name in site.tensors]
    names = {*sites, *(lookup.tensor for lookup in view.family.lookups(view.module))}
    assert num_weights(view) == sum(view.tensors[name].numel() for name in names) < by_shape


@pytest.mark.parametrize(("bits", "other"), [(0.5, "higher"), (64.0, "lower")])
def test_a_rate_that_no_artifact_has_is_named_as_the_option_that_it_is(
    tmp_path: Path, view: View, pico_data: DataFolder, bits: float, other: str
) -> None:
    fit = FitSettings(kappa="off", trellis_states=0)
    settings = LadderSettings(tmp_path / "recipe.toml", ((),), (1.0,), (bits,), 64, 64, fit)
    with pytest.raises(SettingsError, match=rf"^--bits {bits:g}: [\d,]+ bytes") as caught:
        measure_gaps(view, pico_data, settings)
    assert caught.value.hint == f"--bits with a {other} rate in its place"
