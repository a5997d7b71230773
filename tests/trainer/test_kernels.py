"""The Triton kernels against eager PyTorch, interpreted on the CPU and, where there is one, on the GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pgolf_post.checkpoint import Checkpoint
from pgolf_post.data import DataFolder
from pgolf_post.errors import SettingsError
from tests.conftest import pico_recipe
from tests.trainer.kernel_cases import compile_offline
from trainer import kernels
from trainer.run.loop import Trainer

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed; the test extra has it on Linux"
)


def run_cases(folder: Path, *arguments: str, interpret: bool = False) -> dict[str, Any]:
    """The answer of `kernel_cases.py` in a process of its own."""
    environment = {
        **os.environ,
        "TRITON_CACHE_DIR": str(folder / "cache"),
        "TRITON_INTERPRET": "1" if interpret else "0",
    }
    command = [sys.executable, "-m", "tests.trainer.kernel_cases", *arguments]
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


@pytest.fixture(scope="module", params=["cpu", "cuda"])
def answer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, pico_data: DataFolder
) -> dict[str, Any]:
    """Of all cases: by Triton's interpreter, and on the GPU."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    folder = tmp_path_factory.mktemp("kernels")
    folders = (str(pico_data.path), str(folder / "checkpoints"))
    return run_cases(folder, request.param, *folders, interpret=request.param == "cpu")


@needs_triton
def test_values_and_gradients_are_eager_float32s(answer: dict[str, Any]) -> None:
    assert len(answer["exact"]) == 15
    for name, error in answer["exact"].items():
        assert error["value"] < 1e-5, (name, error)
        assert error["gradient"] < 1e-4, (name, error)


@needs_triton
def test_narrow_types_are_rounded_only_at_the_ends(answer: dict[str, Any]) -> None:
    loss, mlp = answer["rounded"]["loss bfloat16"], answer["rounded"]["mlp narrow"]
    assert loss["value"] < 1e-5  # of the same rounded z
    assert loss["gradient"] < 2**-7  # one bfloat16 step: the interpreter cuts where eager rounds
    assert max(mlp.values()) < 2**-6
    assert answer["autocast"]["types"] == ["torch.float16", *["torch.float32"] * 3]
    assert answer["autocast"]["error"] < 2**-6


@needs_triton
def test_a_bad_logit_or_a_target_outside_the_vocabulary_is_not_a_number(answer: dict[str, Any]) -> None:
    assert answer["not_numbers"] == [False, True, True, True, True]


@needs_triton
def test_what_does_not_fit_is_refused(answer: dict[str, Any]) -> None:
    messages = answer["refusals"]
    assert "z (3, 5) must be (tokens, vocab) and targets (2,)" in messages["shape"]
    assert "torch.float64" in messages["type"]
    assert "up (6, 8)" in messages["weights"]
    assert "float64" in messages["double"]


@pytest.mark.long
@needs_triton
def test_torch_compile_takes_the_kernels_into_its_graph(answer: dict[str, Any]) -> None:
    assert len(answer["registrations"]) == 4
    assert set(answer["registrations"].values()) == {"{'SUCCESS'}"}
    assert answer["compiled"] == {"same": True}


@needs_triton
def test_a_run_with_kernels_is_the_run_without(answer: dict[str, Any]) -> None:
    training = answer["training"]
    eager, triton = training["eager"], training["triton"]
    assert len(eager) == len(triton) == 4
    for ours, theirs in zip(triton, eager, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-5)
    assert (training["eager meta"], training["triton meta"]) == ("eager", "triton")
    # two micro-batches a step; three visits, one more once the loop is on: training alone, none for scoring checkpoints
    visits = sum(3 + line["active_loops"] for line in triton)
    assert training["calls"] == {"loss": 2 * 4, "mlp": 2 * visits}


@needs_triton
@pytest.mark.parametrize(
    ("capability", "tilings", "shared_kib"),
    [
        pytest.param(90, "one", 227, id="H100"),
        pytest.param(90, "all", 227, id="H100, every tiling", marks=pytest.mark.long),
        pytest.param(80, "all", 163, id="A100, every tiling", marks=pytest.mark.long),
    ],
)
def test_kernels_compile_and_fit_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capability: int, tilings: str, shared_kib: int
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    built = compile_offline(capability, tilings == "all")
    assert len(built) == (4 if tilings == "one" else 9)
    for name, code in built.items():
        assert (code["tensor_core"] > 0) == (name not in ("nats", "gradient")), name
        assert code["shared"] <= shared_kib * 1024, (name, code)
        assert code["spilled"] == 0, (name, code)


def test_auto_is_eager_on_a_cpu_and_meta_says_so(pico_checkpoint: Checkpoint) -> None:
    assert pico_checkpoint.meta["kernels"] == "eager"
    assert pico_checkpoint.meta["recipe"]["run"]["kernels"] == "auto"


@pytest.mark.parametrize(
    ("capability", "autocast", "activation", "triton", "chosen"),
    [
        ((9, 0), torch.bfloat16, "relu2", True, "triton_mlp"),
        ((8, 0), torch.bfloat16, "relu2", True, "triton_mlp"),
        ((8, 9), torch.bfloat16, "relu2", True, "eager"),  # nothing is compiled for it
        ((9, 0), None, "relu2", True, "eager"),
        ((9, 0), torch.bfloat16, "swiglu", True, "eager"),
        ((9, 0), torch.bfloat16, "relu2", False, "eager"),
    ],
)
def test_auto_takes_the_fused_mlp_where_it_is_known_to_compile_and_to_apply(
    capability: tuple[int, int],
    autocast: torch.dtype | None,
    activation: str,
    triton: bool,
    chosen: str,
    pico_data: DataFolder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: object() if triton else None)
    recipe = pico_recipe(pico_data, tmp_path, model={"activation": activation})
    assert kernels.chosen_kernels(recipe, torch.device("cuda"), autocast) == chosen
    assert kernels.chosen_kernels(recipe, torch.device("cpu"), autocast) == "eager"


@needs_triton
@pytest.mark.parametrize(("choice", "mlp", "loss"), [("triton_loss", False, True), ("triton_mlp", True, False)])
def test_each_kernel_has_a_switch_of_its_own(
    choice: str, mlp: bool, loss: bool, pico_data: DataFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.run.loop.require_usable", lambda *_: None)  # there is no GPU to use them on
    run = Trainer(pico_recipe(pico_data, tmp_path, run={"kernels": choice}))
    assert [block.mlp.fused is not None for block in run.model.blocks] == [mlp] * 3
    assert (run.gradients.loss_function is kernels.fused_loss) == loss


def test_kernels_need_triton(tmp_path: Path, pico_data: DataFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = pico_recipe(pico_data, tmp_path, run={"kernels": "triton"})
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SettingsError, match="triton is not installed") as caught:
        Trainer(recipe)
    assert "run.kernels=eager" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("device", "tables", "message"),
    [
        ("cpu", {}, 'needs a CUDA GPU, and this run is on "cpu"'),
        ("cuda", {"run": {"precision": "fp64"}}, 'computes in float32, but run.precision = "fp64"'),
        ("cuda", {"model": {"activation": "swiglu"}}, 'not for "swiglu"'),
    ],
)
def test_kernels_refuse_what_they_cannot_do(
    tmp_path: Path,
    pico_data: DataFolder,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    tables: dict[str, dict[str, object]],
    message: str,
) -> None:
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: object())
    run = {"kernels": "triton", **tables.get("run", {})}
    recipe = pico_recipe(pico_data, tmp_path, **{**tables, "run": run})
    with pytest.raises(SettingsError, match=message):
        kernels.require_usable(recipe, device)
    kernels.require_usable(pico_recipe(pico_data, tmp_path, **tables), device)  # eager: anything goes
