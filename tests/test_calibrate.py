"""Calibration laws: Σxxᵀ of a linear layer, additivity, loops, caching, and training text only."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pgolf_post.calibrate import (
    CalibrationSettings,
    calibrate,
    check_hessian,
    collect_hessians,
    draw_calibration_set,
    pack_upper,
    unpack_upper,
)
from pgolf_post.checkpoint import Checkpoint
from pgolf_post.data import DataFolder
from pgolf_post.errors import DamagedFileError, MismatchError, NumericsError
from pgolf_post.families import Site, get_family, load_module

SETTINGS = CalibrationSettings(tokens=320)


class Toy(nn.Module):
    """An embedding and one linear layer, visited `visits` times on the same input."""

    def __init__(self, visits: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.linear = nn.Linear(4, 3, bias=False)
        self.visits = visits

    def hidden(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        return torch.stack([self.linear(x) for _ in range(self.visits)]).sum(0)


TOY_SITES = [Site("linear.in", "linear", ("linear.weight",))]


@pytest.mark.parametrize("visits", [1, 3])
def test_hessian_of_a_linear_layer_is_the_sum_over_visits_of_its_inputs_outer_products(visits: int) -> None:
    toy = Toy(visits)
    tokens = np.random.default_rng(0).integers(0, 10, (6, 5))
    x = toy.embedding(torch.from_numpy(tokens)).detach().flatten(0, 1).double()
    found = collect_hessians(toy, TOY_SITES, tokens)["linear.in"]
    torch.testing.assert_close(found, visits * x.mT @ x, rtol=1e-6, atol=1e-6)


def test_sums_are_additive_over_the_text() -> None:
    toy = Toy(1)
    a, b = np.random.default_rng(1).integers(0, 10, (2, 4, 5))
    whole = collect_hessians(toy, TOY_SITES, np.concatenate([a, b]))["linear.in"]
    parts = sum(collect_hessians(toy, TOY_SITES, part)["linear.in"] for part in (a, b))
    torch.testing.assert_close(whole, parts, rtol=1e-6, atol=1e-6)


def test_packing_a_symmetric_matrix_loses_nothing_but_float64() -> None:
    a = torch.randn(7, 7, dtype=torch.float64)
    symmetric = (a + a.mT).float().double()
    assert torch.equal(unpack_upper(pack_upper(symmetric)), symmetric)


def test_every_site_of_the_model_is_collected_and_positive(pico_checkpoint: Checkpoint, pico_data: DataFolder) -> None:
    view = pico_checkpoint.load()
    stats = calibrate(view, pico_data, SETTINGS)
    module = load_module(view.config, view.tensors, "test")
    assert set(stats.hessians) == {site.name for site in get_family("golf_gpt").sites(module)}
    assert stats.num_tokens == 320
    for hessian in stats.hessians.values():
        assert torch.equal(hessian, hessian.mT)
        assert float(torch.linalg.eigvalsh(hessian).min()) > -1e-3 * float(hessian.diagonal().max())


def test_head_hessian_is_that_of_the_final_hidden_states(pico_checkpoint: Checkpoint, pico_data: DataFolder) -> None:
    view = pico_checkpoint.load()
    stats = calibrate(view, pico_data, SETTINGS)
    module = load_module(view.config, view.tensors, "test")
    tokens = draw_calibration_set(pico_data, SETTINGS, 16).tokens
    with torch.no_grad():
        x = module.hidden(torch.from_numpy(tokens)).flatten(0, 1).double()  # type: ignore[operator]
    torch.testing.assert_close(stats.hessians["head.in"], x.mT @ x, rtol=1e-5, atol=1e-4)


def test_second_call_reads_and_never_recomputes(
    pico_checkpoint: Checkpoint,
    pico_data: DataFolder,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first = calibrate(pico_checkpoint.load(), pico_data, SETTINGS)
    assert not first.cached

    def refuse(*_: object) -> None:
        raise AssertionError("recomputed")

    monkeypatch.setattr("pgolf_post.calibrate.collect_hessians", refuse)
    second = calibrate(pico_checkpoint.load(), pico_data, SETTINGS)
    assert second.cached
    assert second.id == first.id
    assert "cached" in capsys.readouterr().err
    for site, hessian in first.hessians.items():
        assert torch.equal(hessian, second.hessians[site])


def test_views_settings_and_text_each_have_their_own_statistics(
    pico_checkpoint: Checkpoint, pico_data: DataFolder
) -> None:
    ids = {
        calibrate(pico_checkpoint.load(weights), pico_data, settings).id
        for weights in ("raw", "ema")
        for settings in (SETTINGS, CalibrationSettings(tokens=320, seed=1), CalibrationSettings(tokens=640))
    }
    assert len(ids) == 6


def test_damaged_cache_is_found_and_recomputed_aloud(
    pico_checkpoint: Checkpoint, pico_data: DataFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    first = calibrate(pico_checkpoint.load(), pico_data, SETTINGS)
    payload = pico_checkpoint.derived("stats", first.id) / "stats.safetensors"
    content = bytearray(payload.read_bytes())
    content[-1] ^= 0x40
    payload.write_bytes(content)
    again = calibrate(pico_checkpoint.load(), pico_data, SETTINGS)
    assert not again.cached
    assert "recomputing" in capsys.readouterr().err
    assert torch.equal(again.hessians["head.in"], first.hessians["head.in"])


def test_calibration_reads_the_training_split_only(pico_data: DataFolder) -> None:
    calibration = draw_calibration_set(pico_data, SETTINGS, 16)
    assert {name for name, _, _ in calibration.spans} == {path.name for path in pico_data.shard_paths("train")}
    assert len({(name, offset) for name, offset, _ in calibration.spans}) == 20


def test_same_seed_same_text_other_seed_other_text(pico_data: DataFolder) -> None:
    hashes = [
        draw_calibration_set(pico_data, CalibrationSettings(tokens=320, seed=seed), 16).sha256 for seed in (0, 0, 1)
    ]
    assert hashes[0] == hashes[1] != hashes[2]


def test_asking_for_more_text_than_there_is_says_how_much_there_is(pico_data: DataFolder) -> None:
    with pytest.raises(MismatchError, match="the training split has"):
        draw_calibration_set(pico_data, CalibrationSettings(tokens=10**9), 16)


def test_nan_in_a_hessian_names_the_site() -> None:
    hessian = torch.eye(3, dtype=torch.float64)
    hessian[1, 2] = float("nan")
    with pytest.raises(NumericsError, match=r"site 'blocks\.2\.mlp\.in' has 1 of 9"):
        check_hessian("blocks.2.mlp.in", hessian)


def test_weights_that_overflow_name_the_site_they_break(pico_checkpoint: Checkpoint, pico_data: DataFolder) -> None:
    view = pico_checkpoint.load()
    module = load_module(view.config, {n: t.clone() for n, t in view.tensors.items()}, "test")
    with torch.no_grad():
        module.get_parameter("blocks.2.mlp.fc.weight").fill_(1e30)
    sites = get_family("golf_gpt").sites(module)
    with pytest.raises(NumericsError, match=r"blocks\.2\.mlp\.out"):
        collect_hessians(module, sites, draw_calibration_set(pico_data, SETTINGS, 16).tokens)


def test_truncated_checkpoint_is_found_before_calibration(pico_checkpoint: Checkpoint) -> None:
    path = pico_checkpoint.path / "ema.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DamagedFileError, match=r"ema\.safetensors is damaged"):
        pico_checkpoint.load()
