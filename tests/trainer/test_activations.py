"""Activations: an unknown one is refused by name, and each row says the truth about its function."""

from __future__ import annotations

import inspect

import pytest
import torch

from pgolf_post.errors import SettingsError
from pgolf_post.settings import parse_settings
from tests.trainer.test_model import pico_model
from trainer.model.activations import ACTIVATIONS, activation_of
from trainer.model.architecture import ArchitectureSettings, GraphState, ModelConfig
from trainer.model.gpt import GolfGPT

NAMES = f"unknown activation 'nonsense'; choose one of {', '.join(ACTIVATIONS)}"
SETTINGS = ArchitectureSettings(leaky_slope=0.3)


def test_an_unknown_activation_is_refused_with_the_names_that_there_are() -> None:
    with pytest.raises(SettingsError, match=f"config.json: activation = 'nonsense': .*{NAMES}"):
        parse_settings(ArchitectureSettings, {"activation": "nonsense"}, "config.json")
    with pytest.raises(SettingsError, match=NAMES):
        activation_of("nonsense")


def test_a_model_is_not_built_with_an_activation_that_nothing_checked() -> None:
    config = pico_model().config.model_copy(update={"activation": "nonsense"})
    assert isinstance(config, ModelConfig)
    with pytest.raises(SettingsError, match=NAMES):
        GolfGPT(config, GraphState())


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_reads_what_its_row_says(name: str) -> None:
    row = ACTIVATIONS[name]
    first, *rest = inspect.signature(row.function).parameters.values()
    read = [each.name for each in rest if each.default is each.empty]
    assert (first.default, read) == (inspect.Parameter.empty, [*row.reads])
    assert set(row.reads) <= ArchitectureSettings.model_fields.keys()
    assert row.source
    if row.kernel_slope:
        assert [*inspect.signature(row.kernel_slope).parameters] == [*row.reads]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_power_of_a_row_holds_or_there_is_none(name: str) -> None:
    row, x = ACTIVATIONS[name], torch.linspace(-3, 3, 13, dtype=torch.float64)
    act, gate = row.bind(SETTINGS), torch.linspace(2, -2, 13, dtype=torch.float64)

    def inner(fc: torch.Tensor) -> torch.Tensor:
        return act(gate) * fc if row.gated else act(fc)

    if row.power is not None:
        torch.testing.assert_close(inner(2.5 * x), 2.5**row.power * inner(x))
    else:
        ratio = inner(2.5 * x[x > 0]) / inner(x[x > 0])
        assert ratio.max() - ratio.min() > 0.1  # no power at all


@pytest.mark.parametrize("name", [name for name, row in ACTIVATIONS.items() if row.kernel_slope])
def test_the_kernels_slope_is_the_activations(name: str) -> None:
    row = ACTIVATIONS[name]
    assert row.kernel_slope
    slope = row.kernel_slope(**{key: getattr(SETTINGS, key) for key in row.reads})
    x = torch.linspace(-3, 3, 13, dtype=torch.float64)
    torch.testing.assert_close(row.bind(SETTINGS)(x), torch.where(x < 0, slope * x, x).square())
