"""A second set of weights on a built or compiled model: in place, exact, and without another compilation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pgolf_post.artifacts import requant
from pgolf_post.calibrate import Stats
from pgolf_post.checkpoint import Checkpoint, View
from pgolf_post.data import DataFolder
from pgolf_post.errors import MismatchError, SettingsError
from pgolf_post.families import get_family, load_module
from pgolf_post.pack.artifact import read_artifact
from pgolf_post.plan import read_plan
from pgolf_post.score.cached import load_score, score_artifact, score_view
from pgolf_post.score.phase_times import PhaseTimes
from pgolf_post.score.plain import PlainProtocol
from pgolf_post.score.pool import ModelPool
from pgolf_post.score.protocols import folder_text, score_text
from pgolf_post.score.session import Session
from tests.score.conftest import ttt

CPU = torch.device("cpu")


def test_a_second_artifact_on_the_same_compiled_model_recompiles_nothing(
    pico_checkpoint: Checkpoint, pico_data: DataFolder
) -> None:
    protocol = PlainProtocol(seq_len=16, max_tokens=200)
    text = folder_text(pico_data, protocol)
    torch._dynamo.reset()
    pool, graphs, seconds = ModelPool(compiled=True, backend="eager"), [], []
    for name in ("raw", "ema"):
        view = pico_checkpoint.load(name)  # type: ignore[arg-type]
        family, clock = get_family(view.config["family"]), PhaseTimes()
        model = pool.load(view.config, view.tensors, name, CPU)
        pool.warm_up(model, protocol, len(text[0]), clock)
        compiled = score_text(model, family, *text, protocol)[0]
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        seconds.append(clock.seconds["compile"])
        plain = score_text(load_module(view.config, view.tensors, name), family, *text, protocol)[0]
        assert compiled.nats == pytest.approx(plain.nats, rel=1e-6)
    assert graphs[0] > 0
    assert graphs[1] == graphs[0]
    assert pool.load(view.config, view.tensors, "again", CPU) is model


def test_weights_of_another_shape_are_refused_and_of_another_config_are_built(
    pico_checkpoint: Checkpoint,
) -> None:
    view, pool = pico_checkpoint.load(), ModelPool()
    first = pool.load(view.config, view.tensors, "first", CPU)
    with pytest.raises(MismatchError, match=r"tok_emb\.weight"):
        pool.load(view.config, {**view.tensors, "tok_emb.weight": torch.zeros(3, 3)}, "second", CPU)
    looped_off = {**view.config, "graph": {"active_loops": 0}}
    assert pool.load(looped_off, view.tensors, "third", CPU) is not first


def test_loading_leaves_the_views_tensors_alone(pico_checkpoint: Checkpoint) -> None:
    view, pool = pico_checkpoint.load(), ModelPool()
    before = {name: tensor.clone() for name, tensor in view.tensors.items()}
    pool.load(view.config, view.tensors, "first", CPU)
    pool.load(view.config, {name: tensor + 1 for name, tensor in view.tensors.items()}, "second", CPU)
    assert all(torch.equal(before[name], tensor) for name, tensor in view.tensors.items())


def test_compiling_is_for_models_that_do_not_learn(pico_checkpoint: Checkpoint) -> None:
    view, pool = pico_checkpoint.load(), ModelPool(compiled=True, backend="eager")
    model = pool.load(view.config, view.tensors, "first", CPU)
    with pytest.raises(SettingsError, match="--compile"):
        pool.warm_up(model, ttt("lora"), 700, PhaseTimes())


def test_cached_scores_come_back_with_their_sums(pico_checkpoint: Checkpoint, pico_data: DataFolder) -> None:
    view, protocol = pico_checkpoint.load(), ttt("lora", max_tokens=200)
    session = Session()
    first, cached = score_view(view, pico_data, protocol, session=session)
    assert not cached
    assert first["optimizer_steps"] > 0
    assert first["strict_seconds"] >= first["convention_seconds"] > 0
    again, cached = score_view(view, pico_data, protocol)
    assert cached
    assert again == first
    assert load_score(again).nats == first["nats"]
    assert np.isfinite(load_score(again).unit_nats).all()


def test_a_callers_session_stays_as_it_was(pico_checkpoint: Checkpoint, pico_data: DataFolder, tmp_path: Path) -> None:
    own = tmp_path / "own.safetensors"
    session = Session(partial=own, identity="mine")
    view = pico_checkpoint.load()
    for max_tokens in (100, 200):
        score_view(view, pico_data, PlainProtocol(seq_len=16, max_tokens=max_tokens), session=session)
        assert (session.partial, session.identity) == (own, "mine")
    assert session.clock.seconds["score"] > 0


def test_an_artifact_that_is_decoded_already_is_not_decoded_again(
    view: View, stats: Stats, pico_data: DataFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = requant(view, stats, read_plan("record-1855", [])).path
    decoded, protocol = read_artifact(path), PlainProtocol(seq_len=16, max_tokens=200)
    monkeypatch.setattr("pgolf_post.score.cached.read_artifact", lambda path: pytest.fail("decoded again"))
    first, cached = score_artifact(path, pico_data, protocol, decoded=decoded)
    assert not cached
    assert "decompress_seconds" not in first
    monkeypatch.undo()
    again, cached = score_artifact(path, pico_data, protocol)
    assert cached
    assert again == first
    fresh, _ = score_artifact(path, pico_data, protocol, fresh=True)
    assert fresh["nats"] == first["nats"]
    assert fresh["decompress_seconds"] > 0
