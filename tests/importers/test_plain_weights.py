"""What is imported is a weight: float8 exactly, everything else that is none by name, values that nothing can use."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pgolf_post.checkpoint import Checkpoint
from pgolf_post.data import DataFolder
from pgolf_post.errors import MismatchError, NumericsError
from pgolf_post.importers.foreign_file import read_foreign
from pgolf_post.importers.importing import import_file
from pgolf_post.importers.plain_weights import FLOAT8, WEIGHTS, plain_weights
from tests.importers.test_import import foreign_of, stated_of

NAME = "blocks.0.mlp.fc.weight"


def test_all_types_that_torch_has_are_known() -> None:
    assert {str(dtype) for dtype in FLOAT8} == {f"torch.{name}" for name in dir(torch) if name.startswith("float8_")}
    assert set(WEIGHTS) >= {torch.float64, torch.float32, torch.float16, torch.bfloat16}


@pytest.mark.parametrize("dtype", FLOAT8)
def test_every_float8_value_is_kept(dtype: torch.dtype) -> None:
    bits = torch.arange(256, dtype=torch.uint8)
    values = bits.view(dtype).float()
    usable = bits[values.isfinite() & (values.abs() < 1e19)].view(dtype)
    plain = plain_weights({NAME: usable}, "file").state[NAME]
    assert plain.dtype == torch.float32
    assert torch.equal(plain.to(dtype).view(torch.uint8), usable.view(torch.uint8))


@pytest.mark.parametrize("dtype", WEIGHTS)
def test_weights_stay_as_they_are(dtype: torch.dtype) -> None:
    tensor = torch.randn(4, 3).to(dtype)
    plain = plain_weights({NAME: torch.nn.Parameter(tensor)}, "file")
    assert torch.equal(plain.state[NAME], tensor)
    assert (plain.state[NAME].dtype, plain.state[NAME].requires_grad, plain.notes) == (dtype, False, [])


NO_WEIGHTS = {
    "int8, integers without scales": torch.ones(2, 2, dtype=torch.int8),
    "uint8, integers without scales": torch.ones(2, 2, dtype=torch.uint8),
    "int64, integers without scales": torch.ones(2, 2, dtype=torch.int64),
    "bool, integers without scales": torch.ones(2, 2, dtype=torch.bool),
    "complex64, of which a weight has only the real part": torch.ones(2, 2, dtype=torch.complex64),
    r"sparse \(sparse_coo\)": torch.eye(2).to_sparse(),
    r"without values \(device meta\)": torch.ones(2, 2, device="meta"),
    "float4_e2m1fn_x2, which packs several": torch.ones(2, 2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
}


@pytest.mark.parametrize("why", NO_WEIGHTS)
def test_what_is_no_weight_is_refused_by_name(why: str) -> None:
    state = {"a.weight": torch.ones(2), NAME: NO_WEIGHTS[why], "b.weight": torch.ones(2, dtype=torch.int8)}
    with pytest.raises(MismatchError, match=rf"file: not weights: {NAME} is {why}.*; b\.weight is int8"):
        plain_weights(state, "file")


@pytest.mark.parametrize("view", ["model_state_dict", "ema_state"])
def test_no_view_of_a_file_holds_integers(tmp_path: Path, view: str) -> None:
    state = {NAME: torch.ones(2, 2), "tok_emb.weight": torch.ones(2, 2)}
    saved = {"model_state_dict": dict(state), "ema_state": dict(state)}
    saved[view][NAME] = torch.ones(2, 2, dtype=torch.int8)
    torch.save(saved, tmp_path / "m.pt")
    with pytest.raises(MismatchError, match=f"{NAME} is int8"):
        read_foreign(tmp_path / "m.pt")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e30, 2e19])
def test_a_value_that_no_model_can_use_is_located(tmp_path: Path, value: float) -> None:
    tensor = torch.zeros(4, 6)
    tensor[3, 5] = value
    save_file({NAME: tensor}, tmp_path / "m.safetensors")
    with pytest.raises(NumericsError, match=rf"m\.safetensors \(raw\): {NAME}\[3, 5\] is "):
        read_foreign(tmp_path / "m.safetensors")


def test_a_value_beyond_float16_is_said_and_kept() -> None:
    plain = plain_weights({"a": torch.tensor(65504.0), "b": torch.tensor([0.0, -1e6]), "c": torch.zeros(0)}, "file")
    assert plain.notes == ["b[1] is -1e+06, beyond float16's largest number, 65,504"]


def test_a_float8_model_scores_as_its_float32_twin(
    pico_checkpoint: Checkpoint, pico_data: DataFolder, tmp_path: Path
) -> None:
    state: dict[str, Tensor] = foreign_of(pico_checkpoint)
    given, root = stated_of(pico_checkpoint), tmp_path / "imported"
    nats = []
    for name, dtype in (("narrow", torch.float8_e4m3fn), ("twin", torch.float32)):
        torch.save({**state, NAME: state[NAME].to(torch.float8_e4m3fn).to(dtype)}, tmp_path / f"{name}.pt")
        imported = import_file(tmp_path / f"{name}.pt", given, pico_data, name, metric_tokens=400, root=root)
        nats.append(imported.checkpoint.meta["views"]["raw"]["metric"]["nats"])
        assert any("float8" in note for note in imported.notes) == (name == "narrow")
    assert nats[0] == nats[1]
