"""The sizes of a ladder: what is no change, or no other size, is refused before anything is trained."""

from __future__ import annotations

from pathlib import Path

import pytest

from pgolf_post.errors import SettingsError
from pgolf_post.sizing.ladder import LadderSettings, climb


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
