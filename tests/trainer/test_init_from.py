"""A run that starts from another model's weights: what stays, what moves, what is refused, and what is recorded."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from pydantic import ValidationError

from pgolf_post.checkpoint import Checkpoint, save_checkpoint
from pgolf_post.data import DataFolder
from pgolf_post.errors import MismatchError, NotFoundError, SettingsError
from tests import processes
from tests.conftest import pico_recipe, write_recipe
from trainer.__main__ import command
from trainer.config import Recipe
from trainer.model.architecture import GraphState, ModelConfig
from trainer.model.gpt import GolfGPT
from trainer.plan.dry_run import start_of
from trainer.run.loop import Trainer
from trainer.start.init_from import Start, merged
from trainer.start.init_layers import origins, skip_rows

EPSILON = 2e-5  # of logits up to 30, in float32
NO_LOOPS = {"num_loops": 0, "loop_start": 0, "loop_end": 0}
FOUR: dict[str, Any] = {"num_layers": 4, "loop_start": 1, "loop_end": 2, "xsa_last_n": 0}


def base_of(recipe: Recipe, data: DataFolder, folder: Path, **config: Any) -> Checkpoint:
    """A checkpoint of the recipe's model in which no tensor is zero, one or the same in two rows."""
    model = GolfGPT(recipe.model_config_in(data), GraphState())
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4, generator=generator)
    config = {
        "family": "golf_gpt",
        "model": model.config.model_dump(mode="json"),
        "graph": {"active_loops": 0},
        "tokenizer": {"sha256": data.tokenizer_sha256, "vocab_size": data.vocab_size},
        "data": {"manifest_sha256": data.manifest_sha256},
        **config,
    }
    meta = {"kind": "raw", "phase": "final", "step": 3, "parents": [], "run": "base"}
    return save_checkpoint(folder / "base" / "step_000003-final", config, {"raw": model.state_dict()}, meta)


def started(
    data: DataFolder, folder: Path, there: dict[str, Any], here: dict[str, Any], **init: Any
) -> tuple[Start, Checkpoint]:
    """The start of a recipe with settings `here` from a random model with settings `there`."""
    base = base_of(pico_recipe(data, folder, model=there), data, folder)
    recipe = pico_recipe(data, folder, model=here, init={"checkpoint": base.path, **init})
    return start_of(recipe), base


def rule_of(start: Start, tensor: str) -> str:
    return next(one.rule for one in start.tensors if one.tensor == tensor)


UNCHANGED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "nothing": ({}, {}),
    "deeper by two, gates": ({**NO_LOOPS}, {**NO_LOOPS, "num_layers": 5}),
    "deeper by two, no gates": ({**NO_LOOPS, "skip_gates": False}, {**NO_LOOPS, "skip_gates": False, "num_layers": 5}),
    "deeper by one, no gates": ({**NO_LOOPS, "skip_gates": False}, {**NO_LOOPS, "skip_gates": False, "num_layers": 4}),
    "deeper, with loops": (FOUR, {**FOUR, "num_layers": 5}),
    "wider MLPs": ({}, {"mlp_mult": [2.0, 3.0, 4.0]}),
    "wider gated MLPs": ({"activation": "swiglu"}, {"activation": "swiglu", "mlp_mult": 2.5}),
    "a first MLP": ({"mlp_mult": [2, 0, 2]}, {"mlp_mult": 2}),
    "more key-value heads": ({}, {"num_kv_heads": 2}),
    "an own head": ({}, {"tie_embeddings": False}),
    "own MLPs of re-visits": ({}, {"untied_loop_mlps": True}),
    "bigrams, a bias, a residual before the head": (
        {},
        {"bigram_buckets": 64, "bigram_dim": 8, "output_bias": "zeros", "head_residual_rank": 2},
    ),
    "wider bigrams and rank": (
        {"bigram_buckets": 64, "bigram_dim": 8, "head_residual_rank": 2},
        {"bigram_buckets": 64, "bigram_dim": 12, "head_residual_rank": 4},
    ),
    "a carry": ({}, {"carry": "learnable"}),
}


@pytest.mark.parametrize("case", UNCHANGED)
def test_the_function_stays(case: str, pico_data: DataFolder, tmp_path: Path) -> None:
    there, here = UNCHANGED[case]
    start, _ = started(pico_data, tmp_path, {"xsa_last_n": 0, **there}, {"xsa_last_n": 0, **here})
    assert len(start.logits_differ_by) == (1 if there.get("num_loops") == 0 else 2)
    assert max(start.logits_differ_by.values()) < EPSILON, start
    if case == "nothing":
        assert {one.rule for one in start.tensors} == {"copied"}
        assert set(start.logits_differ_by.values()) == {0.0}


CHANGED: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "copies": ({**NO_LOOPS}, {**NO_LOOPS, "num_layers": 4}, {"layers": [0, 1, 1, 2]}),
    "a layer dropped": ({**NO_LOOPS}, {**NO_LOOPS, "num_layers": 2}, {"layers": [0, 2]}),
    "deeper by one, gates": ({**NO_LOOPS}, {**NO_LOOPS, "num_layers": 4}, {"layers": [-1, 0, 1, 2]}),
    "a wider stream": ({"num_kv_heads": 1}, {"model_dim": 32, "num_heads": 4}, {}),
    "another soft-cap": ({}, {"logit_softcap": 20.0}, {}),
    "a gate that starts half open": ({}, {"attn_gate": "dense"}, {}),
}


@pytest.mark.parametrize("case", CHANGED)
def test_a_function_that_moves_is_measured_and_said(
    case: str, pico_data: DataFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from trainer.start.init_from import show_start

    there, here, init = CHANGED[case]
    start, base = started(pico_data, tmp_path, there, here, **init)
    assert max(start.logits_differ_by.values()) > 1e-2
    show_start(start)
    said = capsys.readouterr().err
    assert f"start from {base.path} (raw weights)" in said
    assert "logits differ by" in said
    if case == "a layer dropped":
        assert rule_of(start, "blocks.1.attn.q.weight") == "copied"
        assert [one.origin for one in start.tensors if one.rule == "dropped" and "mlp.fc" in one.tensor] == [
            "blocks.1.mlp.fc.weight"
        ]
        assert "layers: 0, 2 (of the base, in order)" in said
    if case == "another soft-cap":
        assert "model.logit_softcap 30.0 → 20.0" in said


def test_what_a_layer_loses_by_its_place_is_said(pico_data: DataFolder, tmp_path: Path) -> None:
    """XSA on the last two of three layers is on layers 1 and 2; of four, with layers 0 to 2 first, on layer 2 alone."""
    there: dict[str, Any] = {**NO_LOOPS, "skip_gates": False, "xsa_last_n": 2}
    start, _ = started(pico_data, tmp_path, there, {**there, "num_layers": 4}, layers=[0, 1, 2, -1])
    assert start.settings == {"XSA of layer 1": (True, False)}
    assert max(start.logits_differ_by.values()) > 1e-2


def test_values_follow_the_rules(pico_data: DataFolder, tmp_path: Path) -> None:
    """By hand: a layer that moved from place 1 to 3, a widened MLP, repeated heads, what is dropped."""
    there = {**NO_LOOPS, "bigram_buckets": 64, "bigram_dim": 8}
    here = {**NO_LOOPS, "num_layers": 5, "mlp_mult": 3.0, "num_kv_heads": 2}
    base = base_of(pico_recipe(pico_data, tmp_path, model=there), pico_data, tmp_path)
    recipe = pico_recipe(
        pico_data, tmp_path, model=here, init={"checkpoint": base.path, "layers": [0, -1, -1, 1, 2], "fresh": ["*gain"]}
    )
    trainer = Trainer(recipe)
    new, old = trainer.model.state_dict(), base.load("raw").tensors
    moved = (4 / 2) ** 0.5  # √(place + 1), there over here
    assert torch.equal(new["blocks.3.attn.q.weight"], old["blocks.1.attn.q.weight"])
    torch.testing.assert_close(new["blocks.3.mlp.fc.weight"][:32], moved * old["blocks.1.mlp.fc.weight"])
    assert torch.equal(new["blocks.3.mlp.proj.weight"][:, :32], old["blocks.1.mlp.proj.weight"])
    assert not new["blocks.3.mlp.proj.weight"][:, 32:].any()
    assert new["blocks.3.mlp.fc.weight"][32:].any()
    values = old["blocks.1.attn.v.weight"]
    torch.testing.assert_close(new["blocks.3.attn.v.weight"], moved * torch.cat((values, values)))
    assert not new["blocks.1.attn.proj.weight"].any()
    assert torch.equal(new["blocks.0.attn.q_gain"], torch.full((2,), 4.0))
    start = trainer.start
    assert start is not None
    assert rule_of(start, "bigram.embed.weight") == "dropped"
    assert rule_of(start, "blocks.0.attn.q_gain") == "fresh"
    names = [row[0] for row in merged(start.tensors)]
    assert "blocks.{1,2}.mlp.proj.weight" in names
    assert {row.tensor for row in start.tensors if row.here} == set(new)


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "narrower": ({"mlp_mult": 1.0}, {}, r"blocks.0.mlp.fc.weight 16×16 from .* 32×16: it would lose rows or columns"),
    "heads": ({"num_heads": 4}, {}, "blocks.0.attn.k.weight 4×16 from .* 8×16: it would lose rows or columns"),
    "narrower heads": ({"num_heads": 4, "num_kv_heads": 2}, {}, "q_gain 4 from .* 2: heads would change their width"),
    "buckets": ({"bigram_buckets": 128}, {}, "bigram.embed.weight 128×16 from bigram.embed.weight 64×16: no setting"),
    "fewer layers": ({"num_layers": 2}, {}, "the base has 3 layers, model.num_layers is 2"),
    "short list": ({}, {"layers": [0, 1]}, "lists 2 layers; model.num_layers is 3"),
    "no such layer": ({}, {"layers": [0, 1, 7]}, r"no layer 7; its layers are 0\.\.2"),
    "no such tensor": ({}, {"fresh": ["bigrm.*"]}, "'bigrm.*' matches no tensor"),
    "no such weights": ({}, {"weights": "ema"}, "no 'ema' weights"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_rule_covers_is_refused(case: str, pico_data: DataFolder, tmp_path: Path) -> None:
    here, init, message = REFUSED[case]
    own: dict[str, Any] = {**NO_LOOPS, "bigram_buckets": 64}
    with pytest.raises((MismatchError, SettingsError, NotFoundError), match=message):
        started(pico_data, tmp_path, own, {**own, **here}, **init)


def test_another_vocabulary_is_refused_by_name(pico_data: DataFolder, tmp_path: Path) -> None:
    recipe = pico_recipe(pico_data, tmp_path)
    other = {"tokenizer": {"sha256": "f" * 64, "vocab_size": pico_data.vocab_size}}
    base = base_of(recipe, pico_data, tmp_path, **other)
    with pytest.raises(MismatchError, match=r"rows of tok_emb\.weight mean other pieces"):
        start_of(pico_recipe(pico_data, tmp_path, init={"checkpoint": base.path}))
    anew = pico_recipe(pico_data, tmp_path, init={"checkpoint": base.path, "fresh": ["tok_emb.weight"]})
    start = start_of(anew)
    assert rule_of(start, "tok_emb.weight") == "fresh"
    with pytest.raises(ValidationError, match=r"acts only with init\.checkpoint"):
        pico_recipe(pico_data, tmp_path, init={"fresh": ["tok_emb.weight"]})


@pytest.mark.parametrize("vocab_size", [260, 320, 400])
def test_with_another_vocabulary_rows_of_tokens_start_anew_and_no_logits_are_compared(
    vocab_size: int, pico_data: DataFolder, tmp_path: Path
) -> None:
    words: Any = SimpleNamespace(vocab_size=vocab_size, tokenizer_sha256="f" * 64, manifest_sha256="e" * 64)
    base = base_of(pico_recipe(pico_data, tmp_path), words, tmp_path)
    start = start_of(pico_recipe(pico_data, tmp_path, init={"checkpoint": base.path, "fresh": ["tok_emb.weight"]}))
    assert rule_of(start, "tok_emb.weight") == "fresh"
    assert rule_of(start, "blocks.0.attn.q.weight") == "copied"
    assert start.logits_differ_by == {}


def test_a_skip_finds_its_visit() -> None:
    """By hand: 4 layers, encoder 0 1, decoder 2 3 with rows 0 1; two new layers between stand for rows 0 and 1."""
    base = ModelConfig(num_layers=4, vocab_size=8, train_seq_len=8, xsa_last_n=0)
    config = base.model_copy(update={"num_layers": 6})
    assert origins(base, config, None) == (0, 1, -1, -1, 2, 3)
    rows = skip_rows(base, config, (0, 1, -1, -1, 2, 3))
    assert (rows.origin, rows.unchanged) == ({0: None, 1: 0, 2: 1}, True)
    assert not skip_rows(base, config, (-1, -1, 0, 1, 2, 3)).unchanged


# ---- runs ------------------------------------------------------------------------------------------------------------


def test_a_run_records_its_start_and_resumes_without_the_base(pico_data: DataFolder, tmp_path: Path) -> None:
    base = base_of(pico_recipe(pico_data, tmp_path), pico_data, tmp_path)
    tables: dict[str, Any] = {
        "init": {"checkpoint": base.path},
        "checkpoint": {"steps": [4], "phases": ("init",), "fractions": []},
    }
    recipe = pico_recipe(pico_data, tmp_path, **tables)
    final = Trainer(recipe).run()
    assert final.meta["init"]["id"] == base.view_id("raw")
    assert final.meta["parents"] == [base.view_id("raw")]
    assert final.meta["recipe"]["init"] == {"checkpoint": str(base.path), "weights": None, "layers": None, "fresh": []}
    assert len(final.meta["init"]["tensors"]) == len(final.load("raw").tensors)
    first = Checkpoint.open(final.path.parent / "step_000000-init")
    assert all(
        torch.equal(tensor, base.load("raw").tensors[name]) for name, tensor in first.load("raw").tensors.items()
    )
    assert first.meta["step"] == first.meta["tokens_seen"] == 0

    shutil.rmtree(base.path)
    shutil.rmtree(final.path)
    trainer = Trainer(recipe, resumed=True)
    trainer.resume(next(path for path in final.path.parent.glob("step_000004*")))
    again = trainer.run()
    assert again.meta["init"] == final.meta["init"]
    assert again.meta["views"]["raw"]["id"] == final.meta["views"]["raw"]["id"]


def test_options_that_clash_are_refused_and_a_dry_run_shows_the_table(pico_data: DataFolder, tmp_path: Path) -> None:
    recipe = pico_recipe(pico_data, tmp_path, model={"mlp_mult": 3.0})
    base = base_of(pico_recipe(pico_data, tmp_path), pico_data, tmp_path / "Grüße 🌲")
    path = str(write_recipe(recipe, tmp_path / "recipe.toml"))

    def run(*words: str) -> tuple[int, str]:
        done = CliRunner().invoke(command, [path, *words])
        return done.exit_code, done.output

    code, said = run("--init-from", str(base.path), "--resume", str(base.path))
    assert (code, "give one" in said) == (2, True)
    code, said = run("--init-from", str(base.path), "--set", f"init.checkpoint={base.path}")
    assert (code, "give one" in said) == (2, True)
    code, said = run("--init-from", str(base.path), "--dry-run", "--step-seconds", "1", "--json")
    assert code == 0, said
    assert "blocks.{0,1,2}.mlp.fc.weight" in said
    assert '"rule": "widened"' in said
    assert "loops off: logits differ by" in said


@pytest.mark.long
def test_two_ranks_start_as_one_does(pico_data: DataFolder, tmp_path: Path) -> None:
    finals = []
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        base = base_of(pico_recipe(pico_data, tmp_path), pico_data, folder)
        tables: dict[str, Any] = {"run": {"precision": "fp64"}, "model": {"mlp_mult": 3.0}}
        recipe = pico_recipe(
            pico_data, folder / "checkpoints", **tables, init={"checkpoint": base.path}, schedule={"steps": 3}
        )
        done = processes.run_ranks(ranks, "-m", "trainer", str(write_recipe(recipe, folder / "recipe.toml")))
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("loops off: logits differ by") == 1
        finals.append(Checkpoint.open(folder / "checkpoints" / "latest").load("raw").tensors)
    for name, tensor in finals[0].items():
        torch.testing.assert_close(finals[1][name], tensor, rtol=0, atol=1e-6)
