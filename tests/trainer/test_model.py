"""The model: the public scripts' logits, causality, and runtime graph state."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from pgolf_post.errors import SettingsError
from pgolf_post.settings import parse_settings
from trainer.family import GolfGPTFamily
from trainer.model import GolfGPT, GraphState, ModelConfig, visit_list

PARITY = Path(__file__).parent.parent / "parity"
FIXTURES = ("baseline", "flat_loops_gptj", "flat_untied_plain", "flat_embed_proj")
TOLERANCE = 2e-4  # absolute, float32 logits


def read_fixture(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with safe_open(PARITY / f"{name}.safetensors", "pt") as file:
        return json.loads(file.metadata()["config"]), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def config_of(public: dict[str, Any]) -> ModelConfig:
    """Our settings for a fixture's settings, which are in the public scripts' words."""
    is_baseline = public["activation"] == "relu_squared"
    loops = public.get("num_loops", 0)
    parallel_start = public.get("parallel_residual_start", -1)
    return ModelConfig(
        vocab_size=public["vocab_size"],
        num_layers=public["num_layers"],
        model_dim=public["model_dim"],
        embedding_dim=public.get("embedding_dim"),
        num_heads=public["num_heads"],
        num_kv_heads=public["num_kv_heads"],
        mlp_mult=public["mlp_mult"],
        activation="relu2" if is_baseline else "leaky_relu2",
        tie_embeddings=public["tie_embeddings"],
        logit_softcap=public["logit_softcap"],
        rope_base=public["rope_base"],
        rope_dims=0 if is_baseline else public["rope_dims"],
        rope_ntk=public.get("rope_ntk", False),
        xsa_last_n=public["xsa_last_n"],
        ln_scale=public["ln_scale"],
        skip_gates=public.get("skip_gates_enabled", False),
        loop_start=public["loop_start"] if loops else 0,
        loop_end=public["loop_end"] if loops else 0,
        num_loops=loops,
        gptj_start=parallel_start if parallel_start >= 0 else None,
        train_seq_len=public.get("train_seq_len", 32),
    )


@pytest.mark.parametrize("name", FIXTURES)
def test_logits_equal_the_public_scripts(name: str) -> None:
    public, tensors = read_fixture(name)
    model = GolfGPT(config_of(public), GraphState())
    state = {key.removeprefix("state."): value for key, value in tensors.items() if key.startswith("state.")}
    model.load_state_dict({key.replace("attn.c_", "attn."): value for key, value in state.items()})
    expected = {key: value for key, value in tensors.items() if key.startswith("logits.")}
    assert expected
    for key, logits in expected.items():
        _, length, *phase = key.split(".")
        repeats = int(phase[0].removeprefix("phase")) if phase else 0
        model.set_graph(GraphState(active_loops=min(repeats, model.config.num_loops)))
        with torch.no_grad():
            found = model(tensors[f"tokens.{length}"].long())
        assert float((found - logits).abs().max()) < TOLERANCE, key


def pico_model(**overrides: Any) -> GolfGPT:
    settings: dict[str, Any] = {
        "vocab_size": 50,
        "num_layers": 4,
        "model_dim": 24,
        "num_heads": 2,
        "num_kv_heads": 1,
        "rope_dims": 4,
        "xsa_last_n": 2,
        "train_seq_len": 12,
        "loop_start": 1,
        "loop_end": 2,
        "num_loops": 2,
        **overrides,
    }
    torch.manual_seed(0)
    model = GolfGPT(ModelConfig(**settings), GraphState())
    model.initialise()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("active_loops", [0, 1, 2])
def test_a_changed_token_never_changes_an_earlier_logit(active_loops: int) -> None:
    model = pico_model()
    model.set_graph(GraphState(active_loops=active_loops))
    tokens = torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(1))
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 50
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.equal(before[:, 7:], after[:, 7:])


def test_batches_do_not_mix() -> None:
    model = pico_model()
    tokens = torch.randint(50, (3, 12), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        together = model(tokens)
        alone = torch.cat([model(row[None]) for row in tokens])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_visit_lists() -> None:
    config = pico_model().config
    assert visit_list(config, 0) == [0, 1, 2, 3]
    assert visit_list(config, 1) == [0, 1, 2, 1, 2, 3]
    assert visit_list(config, 2) == [0, 1, 2, 1, 2, 1, 2, 3]


def test_loops_change_the_logits_but_not_the_weights() -> None:
    model = pico_model()
    tokens = torch.arange(12)[None]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    outputs = []
    for loops in range(3):
        model.set_graph(GraphState(active_loops=loops))
        with torch.no_grad():
            outputs.append(model(tokens))
    assert not torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[1], outputs[2])
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())


def test_softcap_bounds_every_logit() -> None:
    model = pico_model(logit_softcap=5.0)
    with torch.no_grad():
        assert float(model(torch.arange(12)[None]).abs().max()) <= 5.0


def test_loops_beyond_the_configured_are_refused() -> None:
    with pytest.raises(SettingsError, match="active_loops 3 exceeds the configured num_loops 2"):
        GolfGPTFamily().build(pico_model().config.model_dump(), {"active_loops": 3})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_heads": 5}, "not a multiple of num_heads 5"),
        ({"num_kv_heads": 3, "num_heads": 4}, "not a multiple of num_kv_heads 3"),
        ({"rope_dims": 5}, "rope_dims 5"),
        ({"loop_end": 9}, "loop_end"),
        ({"leaky_slop": 0.1}, "did you mean 'leaky_slope'"),
    ],
)
def test_impossible_architectures_are_refused_by_name(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        parse_settings(ModelConfig, {**pico_model().config.model_dump(), **overrides}, "config.json: model")


def test_every_matrix_has_a_site_and_sees_its_true_input() -> None:
    model, family = pico_model(), GolfGPTFamily()
    sites = family.sites(model)
    served = [tensor for site in sites for tensor in site.tensors]
    matrices = [name for name, p in model.named_parameters() if family.role(name) != "control" and p.ndim == 2]
    assert sorted(served) == sorted(matrices)
    seen: dict[str, np.ndarray] = {}
    for site in sites:
        module = model.get_submodule(site.module)
        module.register_forward_pre_hook(lambda _, x, name=site.name: seen.__setitem__(name, x[0].numpy()))
    with torch.no_grad():
        model(torch.arange(12)[None])
    for site in sites:
        width = {model.get_parameter(tensor).shape[1] for tensor in site.tensors}
        assert width == {seen[site.name].shape[-1]}, site.name
