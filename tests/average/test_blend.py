"""Blends: the average is the average, unlike things are not averaged, and memory does not grow with the parts."""

from __future__ import annotations

import json
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pgolf_post.average import linear as blend_module
from pgolf_post.average.linear import Blend, Part, linear_blend, save_blend, swa_blend, swa_parts
from pgolf_post.average.settings import Selection
from pgolf_post.checkpoint import VIEW_FILES, Checkpoint, default_checkpoint, save_checkpoint, view_id
from pgolf_post.data import DataFolder
from pgolf_post.errors import DamagedFileError, MismatchError, NotFoundError, NumericsError, SettingsError
from pgolf_post.score.metric import verify_metric


def folders(parts: list[Part]) -> list[str]:
    return [part.checkpoint.path.name for part in parts]


def mean_of(parts: list[Part]) -> dict[str, Tensor]:
    """The blend, done with everything in memory."""
    views = [(part.share, part.checkpoint.load(part.view).tensors) for part in parts]
    return {name: sum(share * tensors[name].double() for share, tensors in views).float() for name in views[0][1]}  # type: ignore[union-attr]


def assert_is(blend: Blend, expected: dict[str, Tensor]) -> None:
    assert blend.tensors.keys() == expected.keys()
    for name, tensor in blend.tensors.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-8)


def copy_with(checkpoint: Checkpoint, name: str, change: Any, config: Any = None) -> Checkpoint:
    """A sibling whose raw tensors are changed and saved as they then are."""
    tensors = {key: tensor.clone() for key, tensor in checkpoint.load("raw").tensors.items()}
    change(tensors)
    path, metric = checkpoint.path.parent / name, checkpoint.meta["views"]["raw"]["metric"]
    meta = {key: value for key, value in checkpoint.meta.items() if key not in ("id", "views")}
    return save_checkpoint(path, config or checkpoint.config, {"raw": tensors}, meta, {"raw": metric})


def test_uniform_swa_is_the_mean_of_the_warmdown_checkpoints(pico_checkpoint: Checkpoint) -> None:
    parts = swa_parts(pico_checkpoint, ema_share=0.0)
    assert folders(parts) == ["step_000006-warmdown_start", "step_000009-frac75", "step_000012-final"]
    assert [part.share for part in parts] == pytest.approx([1 / 3] * 3)
    assert_is(linear_blend(parts), mean_of(parts))


def test_members_are_chosen_by_step_by_number_and_by_phase(pico_checkpoint: Checkpoint) -> None:
    chosen = {
        Selection(steps=(9, 12)): ["step_000009-frac75", "step_000012-final"],
        Selection(last=2): ["step_000009-frac75", "step_000012-final"],
        Selection(last=1): ["step_000012-final"],
        Selection(phase="frac75"): ["step_000009-frac75", "step_000012-final"],
        Selection(phase="warmdown"): ["step_000006-warmdown_start", "step_000009-frac75", "step_000012-final"],
    }
    for selection, expected in chosen.items():
        assert folders(swa_parts(pico_checkpoint, 0.0, selection)) == expected
    earlier = Checkpoint.open(next(pico_checkpoint.path.parent.glob("*frac75")))
    assert folders(swa_parts(earlier, 0.0)) == ["step_000006-warmdown_start", "step_000009-frac75"]


def test_shares_are_proportions_of_the_members(pico_checkpoint: Checkpoint) -> None:
    parts = swa_parts(pico_checkpoint, 0.5, Selection(steps=(6, 9, 12), shares=(1, 2, 1)))
    assert [part.share for part in parts] == pytest.approx([0.125, 0.25, 0.125, 0.5])
    assert parts[-1].view == "ema"
    assert_is(linear_blend(parts), mean_of(parts))
    with pytest.raises(SettingsError, match="2 shares for 3 members"):
        swa_parts(pico_checkpoint, 0.0, Selection(shares=(1, 2)))


def test_raw_and_ema_interpolate(pico_checkpoint: Checkpoint) -> None:
    parts = swa_parts(pico_checkpoint, 0.25, Selection(last=1))
    assert [(part.view, part.share) for part in parts] == [("raw", 0.75), ("ema", 0.25)]
    assert_is(linear_blend(parts), mean_of(parts))


def test_what_names_no_members_says_what_there_is(pico_checkpoint: Checkpoint) -> None:
    for selection, message in (
        (Selection(steps=(9, 10)), r"12 \(final\): none at step 10"),
        (Selection(last=99), r"no 99 of them"),
        (Selection(phase="cooldown"), "from phase 'cooldown' on"),
    ):
        with pytest.raises(NotFoundError, match=message):
            swa_parts(pico_checkpoint, 0.0, selection)
    for wrong in ({"last": 2, "phase": "warmdown"}, {"steps": (9, 9)}, {"shares": (1, -1)}, {"last": 0}):
        with pytest.raises(ValueError):
            Selection(**wrong)  # type: ignore[arg-type]


def test_a_lone_final_checkpoint_cannot_be_averaged(pico_checkpoint: Checkpoint) -> None:
    for folder in pico_checkpoint.path.parent.glob("step_*"):
        if folder != pico_checkpoint.path:
            (folder / "meta.json").unlink()
    with pytest.raises(NotFoundError, match="SWA needs 2"):
        swa_parts(pico_checkpoint, 0.0)


def test_blend_of_identical_checkpoints_is_bit_identical(pico_checkpoint: Checkpoint) -> None:
    def negative_zero(tensors: dict[str, Tensor]) -> None:
        tensors["skip_weights"].flatten()[:2] = -0.0

    same = copy_with(pico_checkpoint, "step_000013-same", negative_zero)
    shares = (1 / 3, 1 / 3, 1 - 2 / 3)
    blend = linear_blend([Part(same, "raw", share) for share in shares])
    assert view_id(blend.tensors, same.config) == same.view_id("raw")
    assert blend.no_op
    assert torch.signbit(blend.tensors["skip_weights"].flatten()[0])


def test_narrow_tensors_are_blended_in_float32(pico_checkpoint: Checkpoint) -> None:
    def narrow(tensors: dict[str, Tensor]) -> None:
        tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()})

    low = copy_with(pico_checkpoint, "step_000013-low", narrow)
    blend = linear_blend([Part(low, "raw", 0.5), Part(pico_checkpoint, "ema", 0.5)])
    assert {tensor.dtype for tensor in blend.tensors.values()} == {torch.float32}
    alone = linear_blend([Part(low, "raw", 1.0)])
    assert alone.no_op
    assert all(torch.equal(alone.tensors[name], tensor.float()) for name, tensor in low.load("raw").tensors.items())


def test_full_ema_share_is_the_ema_and_marked_no_op(pico_checkpoint: Checkpoint, pico_data: DataFolder) -> None:
    blended, cached = swa_blend(pico_checkpoint, 1.0, pico_data)
    assert not cached
    assert blended.meta["no_op"] is True
    assert blended.view_id() == pico_checkpoint.view_id("ema")


def test_blend_is_a_verifiable_checkpoint_that_is_never_the_default(
    pico_checkpoint: Checkpoint, pico_data: DataFolder
) -> None:
    blended, _ = swa_blend(pico_checkpoint, 0.25, pico_data)
    assert (blended.meta["kind"], blended.meta["no_op"]) == ("swa", False)
    assert [parent["share"] for parent in blended.meta["parents"]] == pytest.approx([0.25, 0.25, 0.25, 0.25])
    assert verify_metric(blended.load(), pico_data).passed
    assert default_checkpoint(pico_checkpoint.path.parent.parent).path == pico_checkpoint.path
    again, cached = swa_blend(pico_checkpoint, 0.25, pico_data)
    assert cached
    assert again.path == blended.path
    other, _ = swa_blend(pico_checkpoint, 0.5, pico_data)
    assert other.path != blended.path


def test_any_checkpoints_blend_by_name_and_may_be_extrapolated(
    pico_checkpoint: Checkpoint, pico_data: DataFolder
) -> None:
    earlier = Checkpoint.open(next(pico_checkpoint.path.parent.glob("*frac75")))
    parts = [Part(earlier, "raw", -0.5), Part(pico_checkpoint, "ema", 1.5)]
    blend = linear_blend(parts)
    assert_is(blend, mean_of(parts))
    saved, _ = save_blend(blend, "blend", pico_data, {})
    assert saved.meta["kind"] == "blend"
    assert [(p["folder"], p["view"], p["share"]) for p in saved.meta["parents"]] == [
        ("step_000009-frac75", "raw", -0.5),
        ("step_000012-final", "ema", 1.5),
    ]
    nested = linear_blend([Part(saved, "raw", 0.5), Part(pico_checkpoint, "raw", 0.5)])  # a blend is a checkpoint
    assert not nested.no_op


def test_different_graph_state_is_refused_with_the_key_named_unless_allowed(
    pico_run: Path, pico_data: DataFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    off = Checkpoint.open(next(pico_run.glob("pico/*init*")))
    on = Checkpoint.open(pico_run / "latest")
    parts = [Part(off, "raw", 0.5), Part(on, "raw", 0.5)]
    with pytest.raises(MismatchError, match=r"graph\.active_loops: 0 / 1") as caught:
        linear_blend(parts)
    assert "--allow-different graph.active_loops" in str(caught.value.hint)
    blend = linear_blend(parts, ["graph.active_loops"])
    saved, _ = save_blend(blend, "blend", pico_data, {})
    assert saved.config["graph"]["active_loops"] == 1
    assert saved.meta["allowed_differences"] == {"graph.active_loops": {str(off.path): 0, str(on.path): 1}}
    assert "the result takes that of step_000012-final" in capsys.readouterr().err
    with pytest.raises(SettingsError, match=r"graph\.active_loop: no such config key \(near: graph\.active_loops"):
        linear_blend(parts, ["graph.active_loop"])


def test_every_differing_key_is_listed(pico_checkpoint: Checkpoint) -> None:
    model = {**pico_checkpoint.config["model"], "rope_base": 500.0, "logit_softcap": 20.0}
    other = copy_with(
        pico_checkpoint, "step_000013-x", lambda tensors: None, {**pico_checkpoint.config, "model": model}
    )
    parts = [Part(other, "raw", 0.5), Part(pico_checkpoint, "raw", 0.5)]
    with pytest.raises(MismatchError, match=r"model\.logit_softcap: 20\.0 / 30\.0; model\.rope_base: 500\.0"):
        linear_blend(parts)
    with pytest.raises(MismatchError, match=r"config: model\.rope_base"):
        linear_blend(parts, ["model.logit_softcap"])
    assert linear_blend(parts, ["model.logit_softcap", "model.rope_base"]).reference.config["model"] != model


def test_shares_must_sum_to_one(pico_checkpoint: Checkpoint) -> None:
    for share in (0.9, float("nan")):
        with pytest.raises(SettingsError, match=r"sum to (0\.9|nan)"):
            linear_blend([Part(pico_checkpoint, "raw", share)])
    with pytest.raises(SettingsError, match=r"--ema-share 1\.5"):
        swa_parts(pico_checkpoint, 1.5)


def test_nan_in_one_checkpoint_is_named(pico_checkpoint: Checkpoint) -> None:
    def poison(tensors: dict[str, Tensor]) -> None:
        tensors["blocks.1.mlp.fc.weight"][3, 2] = float("nan")

    bad = copy_with(pico_checkpoint, "step_000011-bad", poison)
    parts = [Part(pico_checkpoint, "raw", 0.5), Part(bad, "raw", 0.5)]
    with pytest.raises(
        NumericsError, match=r"step_000011-bad/weights\.safetensors: blocks\.1\.mlp\.fc\.weight\[3, 2\] is nan"
    ):
        linear_blend(parts)


def test_a_flipped_bit_in_one_checkpoint_is_found(pico_checkpoint: Checkpoint) -> None:
    earlier = Checkpoint.open(next(pico_checkpoint.path.parent.glob("*frac75")))
    path = earlier.path / VIEW_FILES["raw"]
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedFileError, match=r"frac75/weights\.safetensors.*changed after saving"):
        linear_blend(swa_parts(pico_checkpoint, 0.0))


def test_swa_of_a_blend_is_refused(pico_checkpoint: Checkpoint, pico_data: DataFolder) -> None:
    blended, _ = swa_blend(pico_checkpoint, 0.25, pico_data)
    assert json.loads((blended.path / "meta.json").read_text())["kind"] == "swa"
    with pytest.raises(MismatchError, match="'swa'"):
        swa_blend(blended, 0.25, pico_data)


def test_one_tensor_of_one_part_is_open_at_a_time(pico_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most, reads = 0, 0
    read = blend_module.read_tensor

    def counted(path: Path, name: str) -> Tensor:
        nonlocal most, reads
        tensor = read(path, name)
        alive.add(tensor)
        most, reads = max(most, len(alive)), reads + 1
        return tensor

    monkeypatch.setattr(blend_module, "read_tensor", counted)
    blend = linear_blend([*swa_parts(pico_checkpoint, 0.5), *swa_parts(pico_checkpoint, 0.0)][:4])
    assert reads >= 4 * len(blend.tensors)
    assert most == 1


MEMORY = """
import sys
from pathlib import Path
from pgolf_post.average.linear import Part, linear_blend
from pgolf_post.checkpoint import Checkpoint

def peak():  # of this process alone; getrusage would start from what its parent held
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

checkpoints = [Checkpoint.open(Path(path)) for path in sys.argv[1:]]
size = sum(t.numel() * 4 for t in checkpoints[0].load("raw").tensors.values())
linear_blend([Part(c, "raw", 1 / 2) for c in checkpoints[:2]])
two = peak()
linear_blend([Part(c, "raw", 1 / len(checkpoints)) for c in checkpoints])
many = peak()
held = [c.load("raw") for c in checkpoints]
print((many - two) / size, (peak() - many) / size)
"""


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_is_one_model_whatever_the_number_of_parts(tmp_path: Path, pico_checkpoint: Checkpoint) -> None:
    """Eight parts take no more than two; eight in memory at once would take models more."""
    model = {**pico_checkpoint.config["model"], "model_dim": 384, "num_layers": 8, "num_heads": 6, "num_kv_heads": 6}
    config = {**pico_checkpoint.config, "model": model}
    from pgolf_post.families import build_module

    shapes = build_module(config).state_dict()
    meta = {"kind": "raw", "phase": "x", "step": 0, "parents": []}
    paths = []
    for index in range(8):
        tensors = {name: torch.full(tensor.shape, float(index)) for name, tensor in shapes.items()}
        paths.append(save_checkpoint(tmp_path / f"step_{index}", config, {"raw": tensors}, meta).path)
    done = subprocess.run([sys.executable, "-c", MEMORY, *map(str, paths)], capture_output=True, text=True, check=True)
    grown, held = map(float, done.stdout.split())
    assert grown < 0.5
    assert held > 4
