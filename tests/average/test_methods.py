"""The table of averages: every row is reachable by its name, and makes what its function makes."""

from __future__ import annotations

from typing import Any

import pytest

from pgolf_post.average.linear import swa_blend
from pgolf_post.average.methods import AVERAGES, make_average
from pgolf_post.average.settings import Selection, SwaSettings
from pgolf_post.checkpoint import Checkpoint
from pgolf_post.data import DataFolder
from pgolf_post.errors import SettingsError


def test_a_method_by_name_is_its_function(pico_checkpoint: Checkpoint, pico_data: DataFolder) -> None:
    selection = {"steps": (6, 12), "shares": (1, 3)}
    expected, _ = swa_blend(pico_checkpoint, 0.25, pico_data, Selection(**selection))  # type: ignore[arg-type]
    made, cached = make_average(pico_checkpoint, "swa", {**selection, "ema_share": 0.25}, pico_data)
    assert (made.path, cached) == (expected.path, True)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("mean", {}, "unknown average 'mean'; known: swa, power-ema, half-life-ema"),
        ("swa", {"sigma": 0.1}, "unknown key 'sigma'; valid keys here: allow_different, ema_share, last"),
        ("power-ema", {}, "key 'sigma' is required"),
    ],
)
def test_unknown_names_and_keys_are_listed(
    name: str, given: dict[str, Any], message: str, pico_checkpoint: Checkpoint, pico_data: DataFolder
) -> None:
    with pytest.raises(SettingsError, match=message):
        make_average(pico_checkpoint, name, given, pico_data)


def test_every_row_says_what_it_reads_and_where_it_is_from() -> None:
    assert all(method.reads and method.source for method in AVERAGES.values())
    assert SwaSettings(last=2, ema_share=0.5).selection == Selection(last=2)
