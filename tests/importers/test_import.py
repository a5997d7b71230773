"""Foreign files become native folders tensor by tensor, and back; what is missing is asked for; no code is run."""

from __future__ import annotations

import io
import json
import pickle
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from pgolf_post.average.linear import swa_blend
from pgolf_post.average.settings import Selection
from pgolf_post.base.storage import tensors_sha256
from pgolf_post.checkpoint import Checkpoint, default_checkpoint
from pgolf_post.data import DataFolder
from pgolf_post.errors import DamagedFileError, MismatchError, NotFoundError, SettingsError
from pgolf_post.families import build_module, get_family, load_module
from pgolf_post.importers import FORMATS, recognise
from pgolf_post.importers.foreign_config import infer_model
from pgolf_post.importers.foreign_file import read_foreign
from pgolf_post.importers.importing import export_view, import_file
from pgolf_post.importers.log_file import read_log
from pgolf_post.importers.script_words import split_log, translate
from pgolf_post.score.metric import verify_metric

PARITY = Path(__file__).parent.parent / "parity"
FIXTURES = {
    "baseline": "flat",
    "flat_loops_gptj": "flat",
    "flat_embed_proj": "flat",
    "flat_untied_plain": "flat",
    "banked_dense_gate": "banked",
    "banked_record": "banked",
    "banked_out_gate": "banked",
}
ANNOTATIONS = {"format", "eps", "bos_id", "skips", "phases"}  # what the fixtures say about themselves
STATED = {"train_seq_len": 32, "rope_ntk": False, "num_loops": 0, "smear_across_bos": False}


def fixture_state(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A fixture's settings in the public scripts' words, and its foreign state dict."""
    with safe_open(PARITY / f"{name}.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
        given = {**STATED, **{key: value for key, value in config.items() if key not in ANNOTATIONS}}
        names = [key for key in file.keys() if key.startswith("state.")]  # noqa: SIM118
        return given, {key.removeprefix("state."): file.get_tensor(key) for key in names}


def foreign_of(checkpoint: Checkpoint, weights: str = "raw") -> dict[str, Tensor]:
    """The pico checkpoint as a flat state dict."""
    return FORMATS["flat"].from_canonical(checkpoint.load(weights).tensors)  # type: ignore[arg-type]


def stated_of(checkpoint: Checkpoint) -> dict[str, Any]:
    return dict(checkpoint.config["model"])


@pytest.mark.parametrize("name", FIXTURES)
def test_there_and_back_is_tensor_identical(name: str) -> None:
    _, state = fixture_state(name)
    form = recognise(state, name)
    assert form == FIXTURES[name]
    again = FORMATS[form].from_canonical(FORMATS[form].to_canonical(state))
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in state.items())


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_an_exported_checkpoint_imports_as_itself(
    pico_checkpoint: Checkpoint, pico_data: DataFolder, tmp_path: Path, suffix: str
) -> None:
    view = pico_checkpoint.load("raw")
    export_view(view, "flat", tmp_path / f"model{suffix}")
    given, root = stated_of(pico_checkpoint), tmp_path / "imported"
    imported = import_file(tmp_path / f"model{suffix}", given, pico_data, "again", metric_tokens=400, root=root)
    assert imported.format == "flat"
    assert imported.checkpoint.config == pico_checkpoint.config
    assert imported.checkpoint.view_id("raw") == view.id
    assert verify_metric(imported.checkpoint.load("raw"), pico_data).passed
    with pytest.raises(NotFoundError):  # an imported folder is never the default
        default_checkpoint(tmp_path / "imported")


def test_an_ema_stays_an_ema(pico_checkpoint: Checkpoint, pico_data: DataFolder, tmp_path: Path) -> None:
    saved = {
        "step": 12,
        "model_state_dict": {name: tensor.to(torch.bfloat16) for name, tensor in foreign_of(pico_checkpoint).items()},
        "ema_state": foreign_of(pico_checkpoint, "ema"),
        "optimizer_states": [{"state": {}, "param_groups": []}],
    }
    torch.save(saved, tmp_path / "ckpt.pt")
    given, root = stated_of(pico_checkpoint), tmp_path / "imported"
    imported = import_file(tmp_path / "ckpt.pt", given, pico_data, "again", metric_tokens=400, root=root)
    assert imported.checkpoint.path.name == "step_000012-imported"
    assert set(imported.checkpoint.meta["views"]) == {"raw", "ema"}
    assert imported.checkpoint.view_id("ema") == pico_checkpoint.view_id("ema")
    assert imported.checkpoint.load("raw").tensors["tok_emb.weight"].dtype == torch.bfloat16
    assert imported.checkpoint.meta["step"] == 12


def test_runtime_loops_are_assumed_active_aloud_or_taken_as_said(
    pico_checkpoint: Checkpoint, pico_data: DataFolder, tmp_path: Path
) -> None:
    torch.save(foreign_of(pico_checkpoint), tmp_path / "model.pt")
    given, root = stated_of(pico_checkpoint), tmp_path / "imported"
    on = import_file(tmp_path / "model.pt", given, pico_data, "on", metric_tokens=400, root=root)
    off = import_file(tmp_path / "model.pt", given, pico_data, "off", active_loops=0, metric_tokens=400, root=root)
    assert on.assumed["active_loops"] == 1
    assert "active_loops" not in off.assumed
    nats = [imported.checkpoint.meta["views"]["raw"]["metric"]["nats"] for imported in (on, off)]
    assert nats[0] != nats[1]


def test_settings_that_no_shape_determines_are_asked_for_by_name() -> None:
    given, state = fixture_state("banked_record")
    canonical = FORMATS["banked"].to_canonical(state)
    with pytest.raises(SettingsError, match=r"activation, logit_softcap, .*lanes_start, lane_output"):
        infer_model(canonical, {"num_loops": 0})
    assert infer_model(canonical, given).model["lanes_start"] == 3


def test_given_settings_may_not_contradict_the_shapes() -> None:
    given, state = fixture_state("baseline")
    canonical = FORMATS["flat"].to_canonical(state)
    with pytest.raises(MismatchError, match="num_layers: shapes say 5, given 9"):
        infer_model(canonical, {**given, "num_layers": 9})


def test_a_name_that_is_nobodys_is_refused_with_the_nearest() -> None:
    given, state = fixture_state("baseline")
    canonical = FORMATS["flat"].to_canonical(state)
    with pytest.raises(SettingsError, match=r"'rope_dimz' \(did you mean 'rope_dims'.*'data_path'") as caught:
        infer_model(canonical, {**given, "rope_dimz": 16, "data_path": "./data"})
    assert "sparse_attn_gate_scale" in str(caught.value.hint)
    with pytest.raises(SettingsError, match="rope_dims"):
        infer_model(canonical, {**given, "rope_dims": {"x": 1}})


def test_a_public_switch_is_checked_against_the_tensors() -> None:
    given, state = fixture_state("banked_record")
    canonical = FORMATS["banked"].to_canonical(state)
    with pytest.raises(MismatchError, match="attn_gate: shapes say 'sparse', given 'dense'"):
        infer_model(canonical, {**given, "sparse_attn_gate_enabled": False, "gated_attn_enabled": True})
    with pytest.raises(MismatchError, match="smear_gate: shapes say True, given False"):
        infer_model(canonical, {**given, "smear_gate_enabled": False})


def test_settings_of_parts_that_a_model_lacks_are_named_as_unused() -> None:
    given, state = fixture_state("baseline")
    canonical = FORMATS["flat"].to_canonical(state)
    logged = {**given, "ve_enabled": False, "ve_layers": "3,4", "bigram_vocab_size": 0, "bigram_dim": 8}
    assert infer_model(canonical, logged).unused == ["bigram_dim", "value_embed_layers"]
    with pytest.raises(MismatchError, match="bigram_buckets: shapes say 0, given 64"):
        infer_model(canonical, {**logged, "bigram_vocab_size": 64})


EVERY_PART = {  # of the older line and its relatives, in our words
    "embedding_dim": 24,
    "tie_embeddings": False,
    "smear_gate": True,
    "attn_gate": "double_sigmoid",
    "bigram_buckets": 32,
    "bigram_dim": 8,
    "trigram": True,
    "value_residual": True,
    "value_embed_layers": [2, 4],
    "value_embed_dim": 12,
    "untied_loop_mlps": True,
}


@pytest.mark.parametrize("form", FORMATS)
def test_every_part_of_the_older_line_goes_there_and_back_and_is_inferred(form: str) -> None:
    given, _ = fixture_state("flat_loops_gptj")
    basis = {**infer_model(FORMATS["flat"].to_canonical(fixture_state("flat_loops_gptj")[1]), given).model}
    model = get_family("golf_gpt").complete({**basis, **EVERY_PART, "rope_base": 5000.0})
    module = build_module({"family": "golf_gpt", "model": model, "graph": {"active_loops": 2}})
    canonical = {name: torch.randn(tensor.shape) for name, tensor in module.state_dict().items()}
    foreign = FORMATS[form].from_canonical(canonical)
    assert {"ve_shared.proj.weight", "ve_layer_scales.1", "bigram.scale", "blocks.0.attn.vr_lambda"} <= foreign.keys()
    assert {
        "override_mlps.1_p2.fc.weight",
        "smear_gate.weight",
        "blocks.0.attn.attn_gate_proj.weight",
    } <= foreign.keys()
    again = FORMATS[form].to_canonical(foreign)
    assert again.keys() == canonical.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in canonical.items())
    inferred = infer_model(
        again,
        {
            **given,
            "embedding_dim": 24,
            "tie_embeddings": False,
            "rope_base": 5000,
            "ve_layers": "2,4",
            "bigram_vocab_size": 32,
            "trigram": True,
            "attn_out_gate_src": "proj",
            "xsa_last_n": 3,
        },
    )
    assert inferred.model == model
    missing = {name: tensor for name, tensor in foreign.items() if name != "ve_layer_scales.0"}
    with pytest.raises(MismatchError, match=r"ve_layer_scales\.0 is missing"):
        FORMATS[form].to_canonical(missing)


def test_unknown_and_missing_tensors_are_all_listed() -> None:
    _, flat = fixture_state("baseline")
    with pytest.raises(MismatchError, match=r"blocks\.0\.attn\.c_z\.weight, mystery"):
        FORMATS["flat"].to_canonical({**flat, "mystery": torch.zeros(1), "blocks.0.attn.c_z.weight": torch.zeros(1)})
    _, banked = fixture_state("banked_record")
    partial = {name: tensor for name, tensor in banked.items() if name != "kv_bank"}
    with pytest.raises(MismatchError, match="missing kv_bank; unknown mystery"):
        FORMATS["banked"].to_canonical({**partial, "mystery": torch.zeros(1)})


def test_a_frozen_carry_is_imported_with_its_values(pico_data: DataFolder) -> None:
    given, state = fixture_state("banked_record")
    state = {**state, "recur_beta": torch.tensor([1.5, 1.8]), "recur_alpha": torch.full((2, 2), 0.1)}
    canonical = FORMATS["banked"].to_canonical(state)
    inferred = infer_model(canonical, {**given, "parallel_start_layer": 4})
    assert (inferred.model["carry"], inferred.model["carry_per_pass"]) == ("frozen", False)
    assert inferred.assumed["carry"] == "frozen"
    config = {"family": "golf_gpt", "model": inferred.model, "graph": {"active_loops": 2}}
    module = load_module(config, canonical, "test")
    assert torch.equal(module.get_parameter("recur_beta"), state["recur_beta"])


def test_an_unknown_architecture_says_so() -> None:
    with pytest.raises(MismatchError, match=r"unknown architecture.*transformer\.h\.0"):
        recognise({"transformer.h.0.weight": torch.zeros(1)}, "gpt2.pt")


def test_a_bank_of_the_wrong_shape_is_named() -> None:
    _, state = fixture_state("banked_record")
    with pytest.raises(MismatchError, match=r"kv_bank is \(9, 16, 32\)"):
        FORMATS["banked"].to_canonical({**state, "kv_bank": state["kv_bank"][:9]})


def test_vocabulary_of_another_tokenizer_is_refused(pico_data: DataFolder, tmp_path: Path) -> None:
    given, state = fixture_state("baseline")
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(MismatchError, match="a vocabulary of 64"):
        import_file(tmp_path / "model.pt", given, pico_data, "x", root=tmp_path / "checkpoints")
    assert not (tmp_path / "checkpoints").exists()


class Payload:
    """Creates a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_file_that_would_run_code_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    target = tmp_path / "ran"
    torch.save({"model_state_dict": Payload(target)}, tmp_path / "evil.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Payload(target)))
    (tmp_path / "packed.ptz").write_bytes(zlib.compress(pickle.dumps(Payload(target))))
    for name in ("evil.pt", "plain.pt", "packed.ptz"):
        with pytest.raises(DamagedFileError, match="cannot be read as tensors"):
            read_foreign(tmp_path / name)
    assert not target.exists()


@pytest.mark.parametrize("content", [b"", b"garbage", b"x\x9cgarbage", b"PK\x03\x04 not a zip"])
def test_garbage_is_a_clear_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.pt").write_bytes(content)
    with pytest.raises(DamagedFileError, match=r"model\.pt"):
        read_foreign(tmp_path / "model.pt")


def test_a_dictionary_of_something_else_lists_its_keys(tmp_path: Path) -> None:
    torch.save({"weights": torch.zeros(1), "epoch": 3}, tmp_path / "other.pt")
    with pytest.raises(MismatchError, match="its keys: weights, epoch"):
        read_foreign(tmp_path / "other.pt")


def test_the_int8_artifact_gives_rows_times_scales(tmp_path: Path) -> None:
    _, state = fixture_state("baseline")
    rows = {name: tensor for name, tensor in state.items() if tensor.ndim == 2 and name.endswith(".weight")}
    scales = {name: tensor.abs().amax(1).clamp_min(1e-8) / 127 for name, tensor in rows.items()}
    symbols = {name: torch.round(tensor / scales[name][:, None]).to(torch.int8) for name, tensor in rows.items()}
    stored = {
        "__quant_format__": "int8_clean_per_row_v1",
        "quantized": symbols,
        "scales": {name: scale.half() for name, scale in scales.items()},
        "dtypes": dict.fromkeys(rows, "bfloat16"),
        "passthrough": {name: tensor.half() for name, tensor in state.items() if name not in rows},
        "passthrough_orig_dtypes": {},
    }
    buffer = io.BytesIO()
    torch.save(stored, buffer)
    path = tmp_path / "final_model.int8.ptz"
    path.write_bytes(zlib.compress(buffer.getvalue(), 9))
    read = read_foreign(path).views["raw"]
    assert read.keys() == state.keys()
    for name, tensor in state.items():
        torch.testing.assert_close(read[name], tensor, rtol=1e-2, atol=float(tensor.abs().max()) / 127)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DamagedFileError, match="cut short"):
        read_foreign(path)


def test_a_training_log_gives_the_hyperparameters(tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    log.write_text(
        "starting\nHyperparameters:\n  rope_dims: 16\n  ln_scale: True\n  parallel_residual_start: -1\n"
        "  activation: leaky_relu_0.5_squared\n  data_path: ./data\n  logit_softcap: 30.0\nstep 1 loss: 2\n"
    )
    read = read_log(log)
    assert read["rope_dims"] == 16
    assert "step" not in read
    known, other = split_log(read)
    assert other == ["data_path"]
    assert translate(known) == {
        "rope_dims": 16,
        "ln_scale": True,
        "gptj_start": None,
        "activation": "leaky_relu2",
        "logit_softcap": 30.0,
    }
    log.write_text("no settings here\n")
    with pytest.raises(MismatchError, match="no 'Hyperparameters:' line"):
        read_log(log)


def test_a_format_without_a_place_for_a_tensor_says_which(pico_checkpoint: Checkpoint, tmp_path: Path) -> None:
    _, state = fixture_state("banked_record")
    canonical = FORMATS["banked"].to_canonical(state)
    gate = {"blocks.0.mlp.gate.weight": torch.zeros(2, 2)}
    with pytest.raises(MismatchError, match=r"flat format has no place for: blocks\.0\.mlp\.gate\.weight"):
        FORMATS["flat"].from_canonical({**canonical, **gate})
    with pytest.raises(SettingsError, match=r"write a \.pt or a \.safetensors file"):
        export_view(pico_checkpoint.load(), "flat", tmp_path / "model.bin")
    assert not (tmp_path / "model.bin").exists()


def test_imported_phases_of_a_run_are_averaged_like_a_runs_own(
    pico_checkpoint: Checkpoint, pico_data: DataFolder, tmp_path: Path
) -> None:
    root, own = tmp_path / "imported", []
    for phase in ("frac75", "final"):
        mine = Checkpoint.open(next(pico_checkpoint.path.parent.glob(f"*-{phase}")))
        saved = {"step": mine.meta["step"], "model_state_dict": foreign_of(mine), "ema_state": foreign_of(mine, "ema")}
        torch.save(saved, tmp_path / f"{phase}.pt")
        given = stated_of(mine)
        theirs = import_file(tmp_path / f"{phase}.pt", given, pico_data, "theirs", None, 400, root, phase).checkpoint
        assert (theirs.meta["phase"], theirs.path.name) == (phase, mine.path.name)
        own.append(mine)
    blended, _ = swa_blend(theirs, 0.5, pico_data, Selection(phase="frac75"))
    expected, _ = swa_blend(own[-1], 0.5, pico_data, Selection(steps=(9, 12)))
    assert tensors_sha256(blended.load("raw").tensors) == tensors_sha256(expected.load("raw").tensors)
    assert verify_metric(blended.load(), pico_data).passed
    with pytest.raises(NotFoundError, match="from phase 'warmdown' on"):  # no recipe says where it began
        swa_blend(theirs, 0.0, pico_data)
