"""The eval form scores as our scorer does, to the last bit, for every protocol, without a module of ours."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pgolf_post.data import DataFolder
from pgolf_post.errors import SettingsError, VerificationError
from pgolf_post.families import forget_families, get_family, load_family, load_module
from pgolf_post.pack.artifact import read_artifact
from pgolf_post.pack.container import pack
from pgolf_post.quantize.tensor import QuantizedModel
from pgolf_post.score.protocols import Protocol, folder_text, make_protocol, score_text
from pgolf_post.submit.forms import eval_form
from pgolf_post.submit.packed import packed as packed_script
from pgolf_post.submit.packed import shortened
from pgolf_post.submit.prove import prove
from tests.score.conftest import MANY_PARTS, record_model, ttt
from tests.submit.project import placeholders

EXAMPLE = Path(__file__).parents[2] / "examples" / "my_family.py"
PROTOCOLS: dict[str, Callable[[], Protocol]] = {
    "plain": lambda: make_protocol("plain", {"max_tokens": 300}, 32, "test"),
    "sliding": lambda: make_protocol("sliding", {"max_tokens": 300, "stride": 7, "tail": "score"}, 32, "test"),
    "lora": lambda: ttt("lora", max_tokens=400),
    "phased": lambda: ttt("phased", max_tokens=400),
    "sgd": lambda: ttt("sgd", max_tokens=400),
    "scales": lambda: ttt("scales", max_tokens=400),
}
OLD_LINE = {"smear_gate": False, "bigram_buckets": 32, "trigram": True, "value_residual": True, "tie_embeddings": False}
OLD_GATES = {"lanes_start": None, "attn_gate": "double_sigmoid", "attn_gate_source": "query"}
MODELS: dict[str, dict[str, Any]] = {
    "record": {},
    "split in a loop": {"loop_end": 3, "lanes_start": 2},
    "isolated": {"isolate_documents": True, "document_cut": 16},
    "older": {**OLD_GATES, **OLD_LINE, "value_embed_layers": (1, 2), "value_embed_dim": 8, "activation": "swiglu"},
    **MANY_PARTS,
    "carry": {"carry": "frozen", "lanes_start": None, "untied_loop_mlps": True, "embedding_dim": 24, "rope_ntk": True},
}


class Packed:
    """A pico model in an artifact, as floats: decoding is exact."""

    def __init__(self, folder: Path, data: DataFolder, **changes: Any) -> None:
        module = record_model(**changes)
        self.data = data
        self.config = {
            "family": "golf_gpt",
            "model": module.config.model_dump(mode="json"),
            "graph": module.graph.model_dump(mode="json"),
            "tokenizer": {"sha256": data.tokenizer_sha256},
        }
        floats = {name: tensor.numpy().astype("<f4") for name, tensor in module.state_dict().items()}
        self.path = folder / "artifact.pgolf"
        self.path.write_bytes(pack(QuantizedModel(self.config, {}, {}, floats)))

    def score(self, protocol: Protocol) -> dict[str, Any]:
        """Our scorer's sums of the decoded weights."""
        tensors = {n: torch.from_numpy(np.array(a)) for n, a in read_artifact(self.path).tensors.items()}
        module = load_module(self.config, tensors, "test")
        score, _ = score_text(module, get_family("golf_gpt"), *folder_text(self.data, protocol), protocol)
        return score.sums()


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, pico_data: DataFolder) -> Packed:
    return Packed(tmp_path_factory.mktemp("packed"), pico_data)


def run_here(
    source: str, packed: Packed, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> dict[str, Any]:
    """What a script prints, run in this process."""
    monkeypatch.setattr(sys, "argv", ["train_gpt.py", str(packed.data.path)])
    capsys.readouterr()
    exec(compile(source, "train_gpt.py", "exec"), {"__name__": "__main__", "__file__": str(packed.path)})
    answer: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return answer


SHORT = ("lora",)  # the one that reaches most; generating a script takes many seconds


def marked(names: Iterable[str]) -> list[Any]:
    """Names as parameters, those that are left to long runs marked."""
    return [pytest.param(name, marks=pytest.mark.slow if name in SHORT else pytest.mark.long) for name in names]


@pytest.mark.parametrize("name", marked(PROTOCOLS))
def test_the_sums_are_our_scorers_to_the_bit(
    name: str, packed: Packed, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    protocol = PROTOCOLS[name]()
    amalgam = eval_form(packed.config, protocol)
    assert not {"pgolf_post", "trainer", "pydantic", "click", "safetensors"} & set(amalgam.external)
    assert placeholders(amalgam) == set()
    answer = run_here(shortened(amalgam.source), packed, monkeypatch, capsys)
    expected = packed.score(protocol)
    assert {key: answer[key] for key in expected} == expected


@pytest.mark.parametrize("name", marked(MODELS))
def test_every_part_of_the_architecture_survives(
    name: str,
    tmp_path: Path,
    pico_data: DataFolder,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    protocol = make_protocol("sliding", {"max_tokens": 200, "stride": 16, "seq_len": 48}, 48, "test")
    packed = Packed(tmp_path, pico_data, **MODELS[name])
    answer = run_here(eval_form(packed.config, protocol).source, packed, monkeypatch, capsys)
    expected = packed.score(protocol)
    assert {key: answer[key] for key in expected} == expected


@pytest.mark.parametrize("method", marked(("lora", "sgd")))
@pytest.mark.parametrize("parts", MANY_PARTS)
def test_training_with_every_part_survives(
    parts: str,
    method: str,
    tmp_path: Path,
    pico_data: DataFolder,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    protocol = ttt(method, max_tokens=300)
    packed = Packed(tmp_path, pico_data, **MANY_PARTS[parts])
    answer = run_here(shortened(eval_form(packed.config, protocol).source), packed, monkeypatch, capsys)
    expected = packed.score(protocol)
    assert {key: answer[key] for key in expected} == expected


@pytest.mark.slow
def test_the_packed_script_runs_alone_and_a_wrong_sum_is_refused(packed: Packed) -> None:
    protocol = PROTOCOLS["plain"]()
    script = packed_script(eval_form(packed.config, protocol).source).data
    expected = packed.score(protocol)
    proof = prove(script, packed.path, packed.data.path, expected)
    assert dict(proof.sums) == expected
    with pytest.raises(VerificationError, match="does not reproduce the score: nats"):
        prove(script, packed.path, packed.data.path, {**expected, "nats": np.nextafter(expected["nats"], 0)})


def test_a_model_without_a_settings_class_is_refused() -> None:
    family = load_family(f"{EXAMPLE}:TinyGPTFamily")
    config = {"family": family.name, "model": family.complete({"vocab_size": 32}), "graph": {}}
    try:
        with pytest.raises(SettingsError, match="no settings class"):
            eval_form(config, PROTOCOLS["plain"]())
    finally:
        forget_families()
