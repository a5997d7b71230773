"""Blends: the average is the average, and unlike things are not averaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pgolf_post.blend import Part, linear_blend, swa_blend, swa_parts, warmdown_members
from pgolf_post.checkpoint import Checkpoint, default_checkpoint
from pgolf_post.data import DataFolder
from pgolf_post.errors import MismatchError, NotFoundError, SettingsError
from pgolf_post.score.metric import verify_metric


def test_uniform_swa_is_the_mean_of_the_warmdown_checkpoints(pico_checkpoint: Checkpoint) -> None:
    parts = swa_parts(pico_checkpoint, ema_share=0.0)
    names = [part.view.checkpoint.path.name for part in parts]
    assert names == ["step_000006-warmdown_start", "step_000009-frac75", "step_000012-final"]
    blended = linear_blend(parts)
    for name, tensor in blended.items():
        mean = torch.stack([part.view.tensors[name].double() for part in parts]).mean(0)
        torch.testing.assert_close(tensor, mean.float(), rtol=1e-6, atol=1e-7)


def test_blend_of_identical_checkpoints_is_bit_identical(pico_checkpoint: Checkpoint) -> None:
    view = pico_checkpoint.load("raw")
    blended = linear_blend([Part(view, 1 / 3), Part(view, 1 / 3), Part(view, 1 - 2 / 3)])
    assert all(torch.equal(blended[name], tensor) for name, tensor in view.tensors.items())


def test_full_ema_share_is_the_ema_and_marked_no_op(pico_checkpoint: Checkpoint, pico_data: DataFolder) -> None:
    blended, cached = swa_blend(pico_checkpoint, 1.0, pico_data)
    assert not cached
    assert blended.meta["no_op"] is True
    assert blended.view_id() == pico_checkpoint.view_id("ema")


def test_blend_is_a_verifiable_checkpoint_that_is_never_the_default(
    pico_checkpoint: Checkpoint, pico_data: DataFolder
) -> None:
    blended, _ = swa_blend(pico_checkpoint, 0.25, pico_data)
    assert blended.meta["kind"] == "swa"
    assert [parent["share"] for parent in blended.meta["parents"]] == pytest.approx([0.25, 0.25, 0.25, 0.25])
    assert verify_metric(blended.load(), pico_data).passed
    assert default_checkpoint(pico_checkpoint.path.parent.parent).path == pico_checkpoint.path
    again, cached = swa_blend(pico_checkpoint, 0.25, pico_data)
    assert cached
    assert again.path == blended.path
    other, _ = swa_blend(pico_checkpoint, 0.5, pico_data)
    assert other.path != blended.path


def test_different_graph_state_is_refused_with_the_key_named(pico_run: Path) -> None:
    off = Checkpoint.open(next(pico_run.glob("pico/*init*")))
    on = Checkpoint.open(pico_run / "latest")
    with pytest.raises(MismatchError, match=r"graph\.active_loops: 0 / 1"):
        linear_blend([Part(off.load("raw"), 0.5), Part(on.load("raw"), 0.5)])


def test_shares_must_sum_to_one(pico_checkpoint: Checkpoint) -> None:
    with pytest.raises(SettingsError, match=r"sum to 0\.9"):
        linear_blend([Part(pico_checkpoint.load("raw"), 0.9)])
    with pytest.raises(SettingsError, match=r"--ema-share 1\.5"):
        swa_parts(pico_checkpoint, 1.5)


def test_a_lone_final_checkpoint_cannot_be_averaged(pico_checkpoint: Checkpoint) -> None:
    for folder in pico_checkpoint.path.parent.glob("step_*"):
        if folder != pico_checkpoint.path:
            (folder / "meta.json").unlink()
    with pytest.raises(NotFoundError, match="SWA needs 2"):
        warmdown_members(pico_checkpoint)


def test_swa_of_a_blend_is_refused(pico_checkpoint: Checkpoint, pico_data: DataFolder) -> None:
    blended, _ = swa_blend(pico_checkpoint, 0.25, pico_data)
    assert json.loads((blended.path / "meta.json").read_text())["kind"] == "swa"
    with pytest.raises(MismatchError, match="'swa'"):
        swa_blend(blended, 0.25, pico_data)
