"""The calibration set: by content, from training text, the model's own or random ids, and never from validation."""

from __future__ import annotations

import copy
import shutil
from typing import Any

import numpy as np
import pytest
import torch

from pgolf_post.calibrate import CalibrationSettings, calibrate, generate
from pgolf_post.calibrate.generate import own_text, write_windows
from pgolf_post.calibrate.randomness import uniforms
from pgolf_post.calibrate.text import draw_training_text, random_text
from pgolf_post.checkpoint import Checkpoint
from pgolf_post.data import DataFolder
from pgolf_post.errors import MismatchError, SettingsError
from pgolf_post.families import load_module
from tests.calibrate.conftest import SETTINGS, Toy


def test_windows_are_distinct_and_of_the_training_split_only(pico_data: DataFolder) -> None:
    text = draw_training_text(pico_data, SETTINGS, 16)
    assert {name for name, _, _ in text.spans} == {path.name for path in pico_data.shard_paths("train")}
    assert len({(name, offset) for name, offset, _ in text.spans}) == 20
    assert text.tokens.shape == (20, 16)


def test_same_seed_same_text_other_seed_other_text(pico_data: DataFolder) -> None:
    draws = [draw_training_text(pico_data, SETTINGS.model_copy(update={"seed": seed}), 16) for seed in (0, 0, 1)]
    assert draws[0].sha256 == draws[1].sha256 != draws[2].sha256


def test_asking_for_more_text_than_there_is_says_how_much_there_is(pico_data: DataFolder) -> None:
    with pytest.raises(MismatchError, match="the training split has"):
        draw_training_text(pico_data, CalibrationSettings(tokens=10**9), 16)


@pytest.mark.parametrize("how", ["content", "name"])
def test_validation_text_passed_off_as_training_is_refused(pico_data: DataFolder, how: str) -> None:
    manifest = copy.deepcopy(pico_data.manifest)
    validation = manifest["splits"]["val"]["shards"][0]
    taken = {**validation, "file": "fineweb_train_000000.bin"} if how == "content" else {**validation, "sha256": "0"}
    manifest["splits"]["train"]["shards"] = [taken]
    with pytest.raises(MismatchError, match=r"is validation text; .* the challenge allows no GPTQ calibration"):
        draw_training_text(DataFolder(pico_data.path, manifest), SETTINGS, 16)


def test_random_text_is_uniform_over_the_vocabulary() -> None:
    text = random_text(7, CalibrationSettings(tokens=7000, source="random"), 10).tokens
    counts = np.bincount(text.flatten(), minlength=7)
    assert text.shape == (700, 10)
    assert (abs(counts - 1000) < 150).all()


# ---- text that the model writes itself ---------------------------------------------------------------------------


def test_own_text_is_reproducible_whatever_the_batch(pico_checkpoint: Checkpoint) -> None:
    """A window's tokens depend on the seed and its number: written alone or among others, they are the same."""
    view = pico_checkpoint.load()
    module = load_module(view.config, view.tensors, "test")
    numbers = uniforms(3, "generation", range(5), 16)
    together = write_windows(module, numbers, 0.9)
    alone = np.concatenate([write_windows(module, numbers[i : i + 1], 0.9) for i in range(5)])
    assert np.array_equal(together, alone)
    assert (together[:, 0] == 1).all()
    other = write_windows(module, uniforms(4, "generation", range(5), 16), 0.9)
    assert not np.array_equal(together, other)


def test_own_text_is_what_the_whole_forward_pass_would_draw(pico_checkpoint: Checkpoint) -> None:
    """Token by token from the full model, without a past: the same draws."""
    view = pico_checkpoint.load()
    module = load_module(view.config, view.tensors, "test")
    numbers = uniforms(0, "generation", range(2), 12)
    tokens = torch.ones(2, 1, dtype=torch.int64)
    with torch.no_grad():
        for position in range(1, 12):
            logits = module.logits(module.hidden(tokens))[:, -1]  # type: ignore[operator]
            p = torch.softmax(logits.double() / 0.7, -1).cumsum(-1)
            drawn = (p <= torch.from_numpy(numbers[:, position : position + 1])).sum(-1, keepdim=True)
            tokens = torch.cat([tokens, drawn], 1)
    assert np.array_equal(write_windows(module, numbers, 0.7), tokens.numpy())


def test_a_cold_model_writes_one_text_and_a_hot_one_many(pico_checkpoint: Checkpoint) -> None:
    view = pico_checkpoint.load()
    module = load_module(view.config, view.tensors, "test")
    numbers = uniforms(0, "generation", range(8), 16)
    cold, hot = write_windows(module, numbers, 1e-6), write_windows(module, numbers, 5.0)
    assert len(np.unique(cold, axis=0)) == 1
    assert len(np.unique(hot, axis=0)) == 8


def test_own_text_is_kept_and_calibrated_on(pico_checkpoint: Checkpoint, pico_data: DataFolder) -> None:
    view = pico_checkpoint.load()
    settings = CalibrationSettings(tokens=160, source="self", temperature=0.8)
    first, second = (calibrate(view, pico_data, settings) for _ in range(2))
    assert (first.cached, second.cached, first.num_tokens) == (False, True, 160)
    assert len(list(pico_checkpoint.path.glob("derived/selftext/*/meta.json"))) == 1
    assert np.array_equal(own_text(view, settings, 16), own_text(view, settings, 16))
    warmer = calibrate(view, pico_data, settings.model_copy(update={"temperature": 2.0}))
    assert warmer.id != first.id


def test_an_interrupted_text_goes_on(
    pico_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    view, settings = pico_checkpoint.load(), CalibrationSettings(tokens=128, source="self")
    monkeypatch.setattr(generate, "WINDOWS_AT_ONCE", 2)
    whole = own_text(view, settings, 16)
    shutil.rmtree(pico_checkpoint.path / "derived" / "selftext")
    monkeypatch.setattr(generate, "SAVE_SECONDS", 0.0)
    written: list[np.ndarray] = []
    most = 3

    def interrupted(*arguments: Any) -> np.ndarray:
        if len(written) == most:
            raise KeyboardInterrupt
        written.append(write_windows(*arguments))
        return written[-1]

    monkeypatch.setattr(generate, "write_windows", interrupted)
    with pytest.raises(KeyboardInterrupt):
        own_text(view, settings, 16)
    left = sorted(pico_checkpoint.path.glob("derived/selftext/*.partial/*.safetensors"))
    damaged = bytearray(left[0].read_bytes())
    damaged[-1] ^= 1
    left[0].write_bytes(damaged)
    written.clear()
    most = 2  # the damaged one, and the one that was not reached
    monkeypatch.setattr(generate, "write_windows", interrupted)
    assert np.array_equal(own_text(view, settings, 16), whole)
    assert len(written) == most
    said = capsys.readouterr().err
    assert "its windows are written again" in said
    assert "resuming: 2 of 4 batches of text were written before" in said
    assert not list(pico_checkpoint.path.glob("derived/selftext/*.partial*"))


def test_a_family_that_cannot_continue_a_text_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"has no start_past\(\)"):
        write_windows(Toy(1), np.zeros((1, 3)), 1.0)
