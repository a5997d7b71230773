"""Weights are found in what people save around them; wrappers' words go from the names; what is left out is said."""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pgolf_post.errors import DamagedFileError, MismatchError
from pgolf_post.importers.foreign_file import ForeignFile, read_foreign

STATE = {
    "tok_emb.weight": torch.arange(6.0).reshape(2, 3),
    "blocks.0.attn.c_q.weight": torch.ones(2, 2),
    "skip_weights": torch.zeros(1, 2),
}


def reread(saved: Any, tmp_path: Path) -> ForeignFile:
    torch.save(saved, tmp_path / "m.pt")
    return read_foreign(tmp_path / "m.pt")


def assert_state(found: Any, expected: dict[str, Tensor] = STATE) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


PREFIXES = [
    "_orig_mod.",
    "module.",
    "module._orig_mod.",
    "_orig_mod.module.",
    "_orig_mod._orig_mod.",
    "model.",
    "module.model._orig_mod.",
    "_forward_module._fsdp_wrapped_module.",
]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_any_nesting_of_wrappers_is_taken_off_aloud(tmp_path: Path, prefix: str) -> None:
    read = reread({prefix + name: tensor for name, tensor in STATE.items()}, tmp_path)
    assert_state(read.views["raw"])
    for part in prefix.split(".")[:-1]:
        assert f"{part}." in read.notes[0]


def test_a_block_that_was_compiled_alone_loses_the_word_in_the_middle(tmp_path: Path) -> None:
    renamed = {name.replace("blocks.0.", "blocks.0._orig_mod."): tensor for name, tensor in STATE.items()}
    assert_state(reread(renamed, tmp_path).views["raw"])


def test_names_without_wrappers_are_left_alone_in_silence(tmp_path: Path) -> None:
    read = reread(STATE, tmp_path)
    assert_state(read.views["raw"])
    assert read.notes == []


def test_two_names_that_become_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match=r"holds skip_weights twice, once as module\.skip_weights"):
        reread({**STATE, "module.skip_weights": torch.ones(1, 2)}, tmp_path)


def test_the_counter_of_an_averaged_model_is_no_weight(tmp_path: Path) -> None:
    averaged = {f"module.{name}": tensor for name, tensor in STATE.items()}
    read = reread({"n_averaged": torch.tensor(5), **averaged}, tmp_path)
    assert_state(read.views["raw"])
    assert "ignored: n_averaged" in read.notes[0]


@pytest.mark.parametrize("key", ["model_state_dict", "state_dict", "model"])
def test_further_keys_are_said_to_be_ignored(tmp_path: Path, key: str) -> None:
    saved = {key: STATE, "optimizer": {"state": {}}, "iter_num": 10, "config": {"a": 1}, "rng": torch.get_rng_state()}
    read = reread(saved, tmp_path)
    assert_state(read.views["raw"])
    assert read.step == 10
    assert read.notes == [f"read: {key} (raw weights), iter_num; ignored: optimizer, config, rng"]


def test_values_among_the_tensors_are_ignored_aloud(tmp_path: Path) -> None:
    read = reread({**STATE, "step": 7, "config": {"a": 1}}, tmp_path)
    assert_state(read.views["raw"])
    assert read.notes == ["read: its tensors (raw weights); ignored: step, config"]


AVERAGES = {
    "ema_state": ("ema", STATE),
    "ema_state_dict": ("ema", STATE),
    "ema": ("ema", {"decay": 0.997, "shadow": STATE}),
    "model_ema": ("ema", {"module": {f"module.{name}": tensor for name, tensor in STATE.items()}, "num_updates": 3}),
    "swa_state": ("swa", {"n": 4, "state_dict": STATE}),
}


@pytest.mark.parametrize("key", AVERAGES)
def test_an_average_is_found_however_it_is_kept(tmp_path: Path, key: str) -> None:
    view, value = AVERAGES[key]
    halves = {name: tensor.half() for name, tensor in STATE.items()}
    read = reread({"model_state_dict": halves, key: value}, tmp_path)
    assert set(read.views) == {"raw", view}
    assert_state(read.views[view])  # type: ignore[index]
    assert "n" not in value or f"ignored: {key}.n" in read.notes[0]


def test_a_shadow_names_what_stands_beside_it(tmp_path: Path) -> None:
    read = reread({"model_state_dict": STATE, "ema_state": {"decay": 0.997, "shadow": STATE}, "step": 10}, tmp_path)
    parts = "read: model_state_dict (raw weights), ema_state.shadow (ema weights), step; ignored: ema_state.decay"
    assert read.notes == [parts]


@pytest.mark.parametrize("value", [{"decay": 0.9}, [torch.ones(2)], {"shadow": {"a": torch.ones(1)}, "model": STATE}])
def test_an_average_that_cannot_be_read_is_refused_not_dropped(tmp_path: Path, value: Any) -> None:
    with pytest.raises(MismatchError, match="ema_state weights are not a dictionary of tensors: a "):
        reread({"model_state_dict": STATE, "ema_state": value}, tmp_path)


@pytest.mark.parametrize("value", [None, {}, False])
def test_an_empty_average_is_none(tmp_path: Path, value: Any) -> None:
    assert set(reread({"model_state_dict": STATE, "ema_state": value}, tmp_path).views) == {"raw"}


def test_two_sets_of_weights_are_not_chosen_from(tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match="several sets of weights: model_state_dict and model"):
        reread({"model_state_dict": STATE, "model": STATE}, tmp_path)
    with pytest.raises(MismatchError, match="several averages: ema_state and ema"):
        reread({"model_state_dict": STATE, "ema_state": STATE, "ema": STATE}, tmp_path)


@pytest.mark.parametrize(
    "step",
    [10, 10.0, "10", np.int64(10), np.int32(10), np.float64(10), np.uint8(10), torch.tensor(10), torch.tensor([10.0])],
    ids=repr,
)
def test_a_step_is_read_however_it_was_saved(tmp_path: Path, step: Any) -> None:
    assert reread({"model_state_dict": STATE, "step": step}, tmp_path).step == 10


@pytest.mark.parametrize(
    ("step", "shown"),
    [
        (None, "empty"), ("final", "'final'"), (-1, "-1"), (1.5, "1.5"), (float("nan"), "nan"), (True, "True"),
        (np.datetime64("2026-04-13"), "an object of numpy"), (torch.ones(2), "tensor"), ({}, "{}"),
        (10**30, "1000"), ("9" * 5000, "'999"), (torch.empty((), device="meta"), "tensor"),
    ],
    ids=lambda value: repr(value)[:20],
)  # fmt: skip
def test_a_step_that_is_no_number_is_said_and_left_out(tmp_path: Path, step: Any, shown: str) -> None:
    read = reread({"model_state_dict": STATE, "step": step}, tmp_path)
    assert read.step is None
    assert any(f"step is {shown}" in note and "imported as step 0" in note for note in read.notes)


@pytest.mark.parametrize(
    "value", [argparse.Namespace(lr=1), SimpleNamespace(a=1), np.random.get_state(), np.arange(3), Path("x")],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_harmless_objects_beside_the_weights_do_not_hide_them(tmp_path: Path, value: Any) -> None:
    read = reread({"model_state_dict": STATE, "args": value}, tmp_path)
    assert_state(read.views["raw"])
    assert "ignored: args" in read.notes[0]


class Loud:
    """Writes a file when it is made, restored, or asked for anything."""

    target = Path("never")

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.target.touch()


def test_a_class_of_the_script_is_stood_in_for_and_never_made(tmp_path: Path) -> None:
    Loud.target = tmp_path / "made"
    Loud.__module__ = "__main__"
    config = Loud.__new__(Loud)
    config.__dict__["a"] = 1
    import __main__

    __main__.Loud = Loud  # type: ignore[attr-defined]
    try:
        assert_state(reread({"model_state_dict": STATE, "config": config}, tmp_path).views["raw"])
    finally:
        del __main__.Loud  # type: ignore[attr-defined]
    assert not Loud.target.exists()


def test_a_file_that_needs_other_code_names_it_and_not_torchs_advice(tmp_path: Path) -> None:
    torch.save({"model_state_dict": STATE, "model": torch.nn.Linear(2, 2)}, tmp_path / "m.pt")
    with pytest.raises(
        DamagedFileError, match=r"it needs torch\.nn\.modules\.linear\.Linear, which would be run"
    ) as caught:
        read_foreign(tmp_path / "m.pt")
    assert "state_dict()" in str(caught.value.hint)
    buffer = io.BytesIO()
    torch.save({"step": np.int64(1), **STATE}, buffer, _use_new_zipfile_serialization=False)
    (tmp_path / "old.pt").write_bytes(buffer.getvalue())
    with pytest.raises(DamagedFileError, match="holds objects of other classes") as caught:
        read_foreign(tmp_path / "old.pt")
    assert "weights_only" not in str(caught.value)
