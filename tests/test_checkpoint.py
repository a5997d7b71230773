"""Checkpoints: ids follow the contents and nothing else, and no damage loads."""

from __future__ import annotations

import copy
import json
import os
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from pgolf_post.base.storage import tensors_sha256
from pgolf_post.checkpoint import (
    SMOKE_FOLDER,
    Checkpoint,
    ViewName,
    default_checkpoint,
    list_checkpoints,
    point_latest,
    read_tensors,
    run_checkpoints,
    save_checkpoint,
    view_id,
    write_tensors,
)
from pgolf_post.errors import DamagedFileError, MismatchError, NotFoundError, NumericsError, PgolfError, SettingsError
from pgolf_post.ledger.disk import rows_at, scan

META = {"kind": "raw", "phase": "final", "step": 12, "parents": []}
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8)


def save(path: Path, like: Checkpoint, **views: Mapping[str, Tensor]) -> Checkpoint:
    """A checkpoint of `like`'s config with other tensors."""
    named: dict[ViewName, Mapping[str, Tensor]] = {"raw": views["raw"]}
    if "ema" in views:
        named["ema"] = views["ema"]
    return save_checkpoint(path, like.config, named, META)


def edit_json(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))


def flip_bit(path: Path, bit: int) -> None:
    contents = bytearray(path.read_bytes())
    contents[bit // 8] ^= 1 << bit % 8
    path.write_bytes(contents)


def header_length(path: Path) -> int:
    """Bytes before the payload: an 8-byte length and the JSON it counts."""
    return 8 + struct.unpack("<Q", path.read_bytes()[:8])[0]


# ---- what goes in comes out ------------------------------------------------------------------------------------------


def test_what_was_saved_is_loaded_bit_for_bit_under_the_same_ids(pico_checkpoint: Checkpoint, tmp_path: Path) -> None:
    raw, ema = pico_checkpoint.load("raw"), pico_checkpoint.load("ema")
    copied = save(tmp_path / "copy", pico_checkpoint, raw=raw.tensors, ema=ema.tensors)
    for original in (raw, ema):
        loaded = copied.load(original.name)
        assert loaded.id == original.id == copied.view_id(original.name)
        assert loaded.tensors.keys() == original.tensors.keys()
        assert all(torch.equal(loaded.tensors[name], tensor) for name, tensor in original.tensors.items())
    assert copied.config == pico_checkpoint.config
    assert copied.meta["id"] == raw.id
    assert META.items() <= copied.meta.items()


def test_raw_and_ema_have_different_ids_and_ema_is_the_default(pico_checkpoint: Checkpoint) -> None:
    assert pico_checkpoint.view_id("raw") != pico_checkpoint.view_id("ema")
    assert pico_checkpoint.load().name == "ema"
    assert pico_checkpoint.view_id() == pico_checkpoint.view_id("ema")


def test_a_checkpoint_without_ema_gives_raw_by_default_and_refuses_ema(
    pico_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    lone = save(tmp_path / "lone", pico_checkpoint, raw=pico_checkpoint.load("raw").tensors)
    assert lone.load().name == "raw"
    with pytest.raises(NotFoundError, match="no 'ema' weights; it has raw"):
        lone.load("ema")


def test_ids_do_not_depend_on_the_order_of_tensors_or_keys(pico_checkpoint: Checkpoint) -> None:
    def reversed_tree(tree: Any) -> Any:
        return {k: reversed_tree(tree[k]) for k in reversed(tree)} if isinstance(tree, dict) else tree

    view = pico_checkpoint.load("raw")
    backwards = {name: view.tensors[name] for name in reversed(list(view.tensors))}
    assert view_id(backwards, reversed_tree(view.config)) == view.id


def test_one_changed_weight_bit_changes_the_id(pico_checkpoint: Checkpoint) -> None:
    view = pico_checkpoint.load("raw")
    for name in ("tok_emb.weight", "blocks.1.attn.q_gain"):
        tensors = {key: tensor.clone() for key, tensor in view.tensors.items()}
        tensors[name].view(torch.int32).view(-1)[-1] ^= 1
        assert view_id(tensors, view.config) != view.id


def test_one_changed_config_key_changes_the_id(pico_checkpoint: Checkpoint) -> None:
    view = pico_checkpoint.load("raw")
    ids = {view.id}
    edits = {"model": ("logit_softcap", 31.0), "graph": ("active_loops", 0), "data": ("manifest_sha256", "0" * 64)}
    for table, (key, value) in edits.items():
        config = copy.deepcopy(view.config)
        assert key in config[table]
        config[table][key] = value
        ids.add(view_id(view.tensors, config))
    assert len(ids) == 1 + len(edits)


def test_a_checkpoint_is_never_overwritten(pico_checkpoint: Checkpoint) -> None:
    view = pico_checkpoint.load("raw")
    before = {path.name: path.read_bytes() for path in pico_checkpoint.path.iterdir()}
    with pytest.raises(PgolfError, match="already exists"):
        save(pico_checkpoint.path, pico_checkpoint, raw=view.tensors)
    assert {path.name: path.read_bytes() for path in pico_checkpoint.path.iterdir()} == before


# ---- tensors_sha256 --------------------------------------------------------------------------------------------------


@st.composite
def tensor_dicts(draw: st.DrawFn) -> dict[str, Tensor]:
    """One to four named tensors of any dtype, 0 to 3 dimensions, arbitrary bytes."""
    names = draw(st.lists(st.text("ab.01", min_size=1, max_size=4), min_size=1, max_size=4, unique=True))
    tensors = {}
    for name in names:
        dtype = draw(st.sampled_from(DTYPES))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        size = int(np.prod(shape)) * dtype.itemsize
        contents = torch.tensor(list(draw(st.binary(min_size=size, max_size=size))), dtype=torch.uint8)
        tensors[name] = contents.view(dtype).reshape(shape)
    return tensors


@given(tensor_dicts())
def test_the_hash_does_not_depend_on_order_or_memory_layout(tensors: dict[str, Tensor]) -> None:
    def scattered(tensor: Tensor) -> Tensor:
        """The same values, every second element of a larger storage, dimensions stored in reverse."""
        room = torch.zeros([*reversed(tensor.shape), 2], dtype=tensor.dtype)
        other = room[..., 1].permute(list(reversed(range(tensor.ndim))))
        return other.copy_(tensor)

    expected = tensors_sha256(tensors)
    assert tensors_sha256({name: scattered(tensors[name]) for name in reversed(list(tensors))}) == expected


@given(tensor_dicts(), st.data())
def test_the_hash_changes_with_any_bit_name_dtype_or_shape(tensors: dict[str, Tensor], data: st.DataObject) -> None:
    expected = tensors_sha256(tensors)
    name = data.draw(st.sampled_from(sorted(tensors)))
    tensor = tensors[name]
    others = {key: value for key, value in tensors.items() if key != name}
    assert tensors_sha256(others) != expected
    assert tensors_sha256({**others, f"{name}2": tensor}) != expected
    assert tensors_sha256({**tensors, name: tensor[None]}) != expected
    twin = {8: torch.float64, 4: torch.int32, 2: torch.int16, 1: torch.bool}[tensor.dtype.itemsize]
    if tensor.numel():
        assert tensors_sha256({**tensors, name: tensor.reshape(-1).view(twin).reshape(tensor.shape)}) != expected
        flipped = tensor.clone().reshape(-1)
        contents = flipped.view(torch.uint8)
        bit = data.draw(st.integers(0, 8 * len(contents) - 1))
        contents[bit // 8] ^= 1 << bit % 8
        assert tensors_sha256({**tensors, name: flipped.reshape(tensor.shape)}) != expected


def test_name_and_shape_boundaries_are_part_of_the_hash() -> None:
    one, two = torch.tensor([1, 2], dtype=torch.uint8), torch.tensor([3], dtype=torch.uint8)
    joined = torch.tensor([1, 2, 3], dtype=torch.uint8)
    assert tensors_sha256({"a": one, "b": two}) != tensors_sha256({"a": joined[:1], "b": joined[1:]})
    assert tensors_sha256({"a": one, "b": two}) != tensors_sha256({"ab": joined})


# ---- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0.0, 7, 8, 100, 0.5, -1], ids=str)
def test_a_truncated_file_is_damaged_and_named(pico_checkpoint: Checkpoint, kept: float) -> None:
    path = pico_checkpoint.path / "weights.safetensors"
    size = path.stat().st_size
    os.truncate(path, int(size * kept) if isinstance(kept, float) else kept % size)
    with pytest.raises(DamagedFileError, match=r"weights\.safetensors is damaged"):
        pico_checkpoint.load("raw")


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
def test_any_flipped_bit_of_the_payload_is_found(pico_checkpoint: Checkpoint, data: st.DataObject) -> None:
    path = pico_checkpoint.path / "ema.safetensors"
    bit = data.draw(st.integers(8 * header_length(path), 8 * path.stat().st_size - 1))
    flip_bit(path, bit)
    try:
        with pytest.raises(DamagedFileError, match=r"ema\.safetensors .*changed after saving"):
            pico_checkpoint.load("ema")
    finally:
        flip_bit(path, bit)
    assert pico_checkpoint.load("ema").id == pico_checkpoint.view_id("ema")


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
def test_any_flipped_bit_of_the_header_is_found(pico_checkpoint: Checkpoint, data: st.DataObject) -> None:
    path = pico_checkpoint.path / "weights.safetensors"
    bit = data.draw(st.integers(0, 8 * header_length(path) - 1))
    flip_bit(path, bit)
    try:
        with pytest.raises((DamagedFileError, MismatchError), match=r"weights\.safetensors"):
            pico_checkpoint.load("raw")
    finally:
        flip_bit(path, bit)


@pytest.mark.parametrize("name", ["config.json", "meta.json"])
@pytest.mark.parametrize("contents", ["", "{", "[]", '{"format_version": 2}', "{}"])
def test_unreadable_json_is_damaged_and_named(pico_checkpoint: Checkpoint, name: str, contents: str) -> None:
    (pico_checkpoint.path / name).write_text(contents)
    with pytest.raises(DamagedFileError, match=rf"{name}.* (JSON|format_version)"):
        Checkpoint.open(pico_checkpoint.path)


@pytest.mark.parametrize(
    ("name", "key"),
    [("config.json", key) for key in ("family", "model", "graph")]
    + [("meta.json", key) for key in ("id", "kind", "views")],
)
@pytest.mark.parametrize("damage", ["missing", "of another kind"])
def test_json_that_lacks_what_a_checkpoint_must_have_is_damaged(
    pico_checkpoint: Checkpoint, name: str, key: str, damage: str
) -> None:
    edit_json(pico_checkpoint.path / name, lambda tree: tree.pop(key) if damage == "missing" else tree.update({key: 3}))
    with pytest.raises(DamagedFileError, match=rf"{name}.*'{key}'"):
        Checkpoint.open(pico_checkpoint.path)


def test_a_missing_meta_means_incomplete_and_a_missing_file_is_named(pico_checkpoint: Checkpoint) -> None:
    path = pico_checkpoint.path
    (path / "ema.safetensors").unlink()
    with pytest.raises(NotFoundError, match=r"ema\.safetensors"):
        pico_checkpoint.load("ema")
    (path / "config.json").rename(path / "elsewhere")
    with pytest.raises(NotFoundError, match=r"config\.json"):
        Checkpoint.open(path)
    (path / "elsewhere").rename(path / "config.json")
    (path / "meta.json").unlink()
    with pytest.raises(DamagedFileError, match=r"not a complete checkpoint: it has no meta\.json") as caught:
        Checkpoint.open(path)
    assert caught.value.hint == "pgolf-post checkpoint list"


def test_a_config_edited_after_saving_is_found(pico_checkpoint: Checkpoint) -> None:
    edit_json(pico_checkpoint.path / "config.json", lambda config: config["graph"].update(active_loops=0))
    with pytest.raises(DamagedFileError, match=r"config\.json changed after saving"):
        Checkpoint.open(pico_checkpoint.path).load("raw")


def test_every_tensor_that_does_not_fit_the_config_is_named_at_once(
    pico_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    tensors = dict(pico_checkpoint.load("raw").tensors)
    del tensors["blocks.0.attn.q.weight"], tensors["blocks.2.mlp_scale"]
    tensors["blocks.7.mlp.fc.weight"] = torch.zeros(2, 3)
    tensors["tok_emb.weight"] = tensors["tok_emb.weight"][:-1]
    offenders = (
        "missing blocks.0.attn.q.weight (16, 16)",
        "missing blocks.2.mlp_scale (16,)",
        "unexpected blocks.7.mlp.fc.weight (2, 3)",
        "tok_emb.weight is (319, 16), config says (320, 16)",
    )
    with pytest.raises(MismatchError) as saving:
        save(tmp_path / "misfit", pico_checkpoint, raw=tensors)
    assert not (tmp_path / "misfit").exists()
    write_tensors(pico_checkpoint.path / "weights.safetensors", tensors)
    with pytest.raises(MismatchError, match=r"weights\.safetensors") as loading:
        pico_checkpoint.load("raw")
    for caught in (saving, loading):
        assert [offender for offender in offenders if offender not in str(caught.value)] == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_named_with_its_place(
    pico_checkpoint: Checkpoint, tmp_path: Path, value: float
) -> None:
    tensors = {name: tensor.clone() for name, tensor in pico_checkpoint.load("raw").tensors.items()}
    tensors["blocks.1.mlp.fc.weight"][3, 5] = value
    broken = save(tmp_path / "broken", pico_checkpoint, raw=tensors)
    with pytest.raises(NumericsError, match=rf"blocks\.1\.mlp\.fc\.weight\[3, 5\] is {value}"):
        broken.load("raw")


def test_an_unknown_family_names_the_known_ones(pico_checkpoint: Checkpoint) -> None:
    edit_json(pico_checkpoint.path / "config.json", lambda config: config.update(family="golf_gbt"))
    with pytest.raises(SettingsError, match=r"unknown model family 'golf_gbt'; installed families:.*golf_gpt"):
        Checkpoint.open(pico_checkpoint.path).load("raw")


def test_more_active_loops_than_the_model_has_are_refused(pico_checkpoint: Checkpoint) -> None:
    edit_json(pico_checkpoint.path / "config.json", lambda config: config["graph"].update(active_loops=2))
    with pytest.raises(SettingsError, match="active_loops 2 exceeds the configured num_loops 1"):
        Checkpoint.open(pico_checkpoint.path).load("raw")


def test_an_unknown_model_key_is_named(pico_checkpoint: Checkpoint) -> None:
    edit_json(pico_checkpoint.path / "config.json", lambda config: config["model"].update(rope_dimz=4))
    with pytest.raises(SettingsError, match=r"unknown key 'rope_dimz' \(did you mean 'rope_dims'\?\)"):
        Checkpoint.open(pico_checkpoint.path).load("raw")


def test_reading_tensors_names_a_file_that_is_not_there_and_a_folder_in_its_place(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.safetensors", tmp_path):
        with pytest.raises(NotFoundError, match=r"no such file|is a folder, not a file"):
            read_tensors(path)


def test_tensors_survive_any_memory_layout(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {"transposed": base.T, "sliced": base[:, ::2], "scalar": torch.tensor(7.0), "empty": torch.empty(0, 3)}
    write_tensors(tmp_path / "file.safetensors", tensors)
    loaded = read_tensors(tmp_path / "file.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


# ---- finding checkpoints ---------------------------------------------------------------------------------------------


def test_the_default_is_the_newest_complete_final_of_a_training_run(pico_run: Path) -> None:
    first = Checkpoint.open(pico_run / "latest")
    assert default_checkpoint(pico_run).path == first.path
    newer = pico_run / "another" / first.path.name
    shutil.copytree(first.path, newer)
    created = float(first.meta["created_unix"])
    edit_json(newer / "meta.json", lambda meta: meta.update(created_unix=created + 60))
    assert default_checkpoint(pico_run).path == newer
    for other, changes in (("blend", {"kind": "swa"}), ("early", {"phase": "warmdown_start"})):
        shutil.copytree(newer, pico_run / "another" / other)
        edit_json(
            pico_run / "another" / other / "meta.json",
            lambda meta, changes=changes: meta.update(created_unix=created + 120, **changes),
        )
    assert default_checkpoint(pico_run).path == newer
    shutil.rmtree(newer)
    assert default_checkpoint(pico_run).path == first.path


def test_without_a_final_checkpoint_the_hint_names_the_commands_that_make_one(pico_run: Path, tmp_path: Path) -> None:
    for folder in pico_run.glob("*/*-final"):
        shutil.rmtree(folder)
    for root in (pico_run, tmp_path / "absent"):
        with pytest.raises(NotFoundError, match="no final checkpoint") as caught:
            default_checkpoint(root)
        assert "pgolf-post demo" in str(caught.value.hint)
        assert "python -m trainer" in str(caught.value.hint)


def test_latest_leads_to_the_last_checkpoint_wherever_the_root_is_moved(pico_run: Path) -> None:
    assert Checkpoint.open(pico_run / "latest").path.name == "step_000012-final"
    init = Checkpoint.open(pico_run / "pico" / "step_000000-init")
    point_latest(pico_run, init)
    moved = pico_run.rename(pico_run.with_name("moved"))
    assert Checkpoint.open(moved / "latest").path == (moved / "pico" / "step_000000-init").resolve()


def test_weights_that_are_another_file_are_called_what_they_are(pico_checkpoint: Checkpoint) -> None:
    (pico_checkpoint.path / "ema.safetensors").write_bytes(
        b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\n"
    )
    with pytest.raises(DamagedFileError, match=r"ema\.safetensors is a git-LFS pointer, not the file itself") as caught:
        pico_checkpoint.load("ema")
    assert caught.value.hint == "git lfs pull"


def test_a_link_to_nothing_is_not_found(pico_run: Path) -> None:
    shutil.rmtree(pico_run / "pico")
    with pytest.raises(NotFoundError, match=r"latest is a link to pico/step_\S+, which is not there"):
        Checkpoint.open(pico_run / "latest")
    (pico_run / "latest").unlink()
    (pico_run / "latest").symlink_to("latest")
    with pytest.raises(NotFoundError, match="latest is a link to latest, which is not there"):
        Checkpoint.open(pico_run / "latest")


def test_listing_passes_over_what_is_incomplete_damaged_or_foreign(pico_run: Path) -> None:
    names = [checkpoint.path.name for checkpoint in list_checkpoints(pico_run)]
    assert names == [
        "step_000000-init",
        "step_000003-momentum_warmup_done+loops_on",
        "step_000006-warmdown_start",
        "step_000009-frac75",
        "step_000012-final",
    ]
    run = pico_run / "pico"
    shutil.copytree(run / names[0], run / ".tmp-1-half")
    (run / names[0] / "meta.json").unlink()
    (run / names[1] / "meta.json").write_text("{")
    (run / names[2] / "config.json").unlink()
    edit_json(run / names[3] / "meta.json", lambda meta: meta.update(format_version=2))
    (pico_run / "notes" / "today").mkdir(parents=True)
    (pico_run / "notes" / "today" / "meta.json").write_text("{}")
    (pico_run / "README").touch()
    assert [checkpoint.path.name for checkpoint in list_checkpoints(pico_run)] == names[4:]
    assert list_checkpoints(pico_run / "absent") == []


def test_a_checkpoint_is_among_its_runs_whatever_its_folder_is_called(pico_run: Path) -> None:
    last = Checkpoint.open(pico_run / "latest")
    steps = [int(checkpoint.meta["step"]) for checkpoint in run_checkpoints(last)]
    assert steps == sorted(set(steps))
    assert steps[-1] == 12
    alone = Checkpoint.open(last.path.rename(pico_run / "pico" / "kept"))
    assert [int(checkpoint.meta["step"]) for checkpoint in run_checkpoints(alone)] == steps
    assert next(row.kind for row in rows_at(alone.path)) == "run"


def test_smoke_runs_are_no_runs_of_the_root(pico_run: Path) -> None:
    own = [checkpoint.path for checkpoint in list_checkpoints(pico_run)]
    newest = default_checkpoint(pico_run).path
    shutil.copytree(pico_run / "pico", pico_run / SMOKE_FOLDER / "pico")
    (pico_run / SMOKE_FOLDER / "latest").symlink_to(f"pico/{newest.name}")
    assert [checkpoint.path for checkpoint in list_checkpoints(pico_run)] == own
    assert default_checkpoint(pico_run).path == newest
    assert {row.run for row in scan(pico_run)} == {"pico"}
    assert list_checkpoints(pico_run / SMOKE_FOLDER)


def test_a_run_folder_that_is_a_link_is_followed_and_listed_once(pico_run: Path, tmp_path: Path) -> None:
    root = tmp_path / "other" / "checkpoints"
    root.mkdir(parents=True)
    (root / "linked").symlink_to(pico_run / "pico")
    found = list_checkpoints(root)
    assert [c.path.name for c in found] == [c.path.name for c in list_checkpoints(pico_run)]
    assert {c.path.parent for c in found} == {root / "linked"}
    assert default_checkpoint(root).path == root / "linked" / "step_000012-final"
    (pico_run / "again").symlink_to("pico")
    assert {c.path.parent for c in list_checkpoints(pico_run)} == {pico_run / "pico"}


@pytest.mark.parametrize("damage", ["torn", "empty", "gone"])
def test_a_newest_final_checkpoint_that_cannot_be_read_is_an_error_and_an_older_one_is_taken_by_name(
    pico_run: Path, damage: str
) -> None:
    older = default_checkpoint(pico_run)
    newest = pico_run / "later" / "step_000012-final"
    shutil.copytree(older.path, newest)
    meta = newest / "meta.json"
    if damage == "gone":
        meta.unlink()
    else:
        meta.write_text(meta.read_text()[:40] if damage == "torn" else "")
    with pytest.raises(DamagedFileError, match="later/step_000012-final") as caught:
        default_checkpoint(pico_run)
    assert str(older.path) in str(caught.value.hint)
    assert Checkpoint.open(older.path).meta == older.meta
    for path in (newest, meta):
        if path.exists():
            os.utime(path, (0, 0))  # an old run's damage does not concern the newest
    assert default_checkpoint(pico_run).path == older.path
