"""A tied head saved twice is one tensor; padded rows go only when asked for, and then exactly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from pgolf_post.checkpoint import Checkpoint, ViewName
from pgolf_post.data import DataFolder
from pgolf_post.errors import MismatchError
from pgolf_post.families import load_module
from pgolf_post.importers.importing import import_file
from pgolf_post.importers.vocabulary import MAX_PADDING, fit_vocabulary, retie
from tests.importers.test_import import foreign_of, stated_of

EMBEDDING, HEAD = "tok_emb.weight", "lm_head.weight"


def without(given: dict[str, object], *keys: str) -> dict[str, object]:
    return {key: value for key, value in given.items() if key not in keys}


@pytest.mark.parametrize("stated", [{}, {"tie_embeddings": True}])
def test_a_head_saved_twice_is_tied_again(
    pico_checkpoint: Checkpoint, pico_data: DataFolder, tmp_path: Path, stated: dict[str, object]
) -> None:
    state = foreign_of(pico_checkpoint)
    torch.save({**state, HEAD: state[EMBEDDING].clone()}, tmp_path / "twice.pt")
    given = {**without(stated_of(pico_checkpoint), "tie_embeddings"), **stated}
    imported = import_file(tmp_path / "twice.pt", given, pico_data, "x", metric_tokens=400, root=tmp_path / "i")
    assert imported.checkpoint.view_id("raw") == pico_checkpoint.view_id("raw")  # config and tensors of the tied model
    assert any("tied again" in note for note in imported.notes)
    assert imported.checkpoint.meta["source"]["notes"] == imported.notes


def test_a_head_that_differs_stays_and_may_not_be_called_tied() -> None:
    embedding = torch.randn(8, 4)
    head = embedding.clone()
    head[2, 1] += 0.5
    views: dict[ViewName, dict[str, Tensor]] = {"raw": {EMBEDDING: embedding, HEAD: head}}
    assert retie(views, {}) == (views, [])
    with pytest.raises(MismatchError, match=r"raw weights: 1 of 32 elements differ, by up to 0\.5"):
        retie(views, {"tie_embeddings": True})


def test_equal_heads_stay_if_they_are_stated_to_be_untied() -> None:
    tensors = {EMBEDDING: torch.ones(8, 4), HEAD: torch.ones(8, 4)}
    assert retie({"raw": tensors}, {"tie_embeddings": False}) == ({"raw": tensors}, [])


def test_equal_values_of_another_type_are_tied_and_an_average_may_have_the_head_once() -> None:
    embedding = torch.randn(8, 4).bfloat16()
    views, notes = retie({"raw": {EMBEDDING: embedding, HEAD: embedding.float()}, "ema": {EMBEDDING: embedding}}, {})
    assert [set(tensors) for tensors in views.values()] == [{EMBEDDING}, {EMBEDDING}]
    assert len(notes) == 1


def test_heads_that_are_equal_in_one_view_only_are_kept_in_both_aloud() -> None:
    same, other = torch.ones(8, 4), torch.zeros(8, 4)
    views: dict[ViewName, dict[str, Tensor]] = {
        "raw": {EMBEDDING: same, HEAD: same},
        "ema": {EMBEDDING: same, HEAD: other},
    }
    kept, notes = retie(views, {})
    assert kept == views
    assert "ema" in notes[0]


def padded(state: dict[str, Tensor], rows: int) -> dict[str, Tensor]:
    tall = torch.cat([state[EMBEDDING], torch.full((rows, state[EMBEDDING].size(1)), 0.01)])
    return {**state, EMBEDDING: tall}


def test_padding_is_named_with_the_option_and_trimmed_exactly(
    pico_checkpoint: Checkpoint, pico_data: DataFolder, tmp_path: Path
) -> None:
    extra = -pico_data.vocab_size % 64 or 64
    rows = pico_data.vocab_size + extra
    torch.save(padded(foreign_of(pico_checkpoint), extra), tmp_path / "padded.pt")
    given = {**stated_of(pico_checkpoint), "vocab_size": rows}  # as the script's log states it
    arguments = (tmp_path / "padded.pt", given, pico_data, "x", None, 400, tmp_path / "i")
    with pytest.raises(MismatchError, match=f"{extra} rows more than tokens, padded to a multiple of 64") as caught:
        import_file(*arguments)
    assert "--trim-vocab" in str(caught.value.hint)
    imported = import_file(*arguments, trim_vocab=True)
    assert imported.checkpoint.view_id("raw") == pico_checkpoint.view_id("raw")

    # the logits of all tokens are those of the padded model
    tokens = torch.arange(16)[None]
    config = pico_checkpoint.config
    tall = {**config, "model": {**config["model"], "vocab_size": rows}}
    whole = load_module(tall, padded(dict(pico_checkpoint.load("raw").tensors), extra), "padded")
    trimmed = load_module(config, imported.checkpoint.load("raw").tensors, "trimmed")
    with torch.no_grad():
        expected = whole(tokens)[..., : pico_data.vocab_size]
        torch.testing.assert_close(trimmed(tokens), expected, rtol=1e-6, atol=1e-6)


def test_every_tensor_with_a_row_per_token_is_trimmed() -> None:
    tensors = {
        name: torch.randn(64, 3) for name in (EMBEDDING, HEAD, "value_embed.embed.weight", "bigram.embed.weight")
    }
    views, notes = fit_vocabulary({"raw": tensors}, 60, True, "file", "data")
    sizes = {name: tensor.size(0) for name, tensor in views["raw"].items()}
    assert sizes == {EMBEDDING: 60, HEAD: 60, "value_embed.embed.weight": 60, "bigram.embed.weight": 64}
    assert all(torch.equal(tensor, tensors[name][: sizes[name]]) for name, tensor in views["raw"].items())
    assert "trimmed from 64 rows to 60" in notes[0]


@pytest.mark.parametrize("rows", [59, 60 + MAX_PADDING + 1])
def test_another_tokenizers_model_is_not_trimmed(rows: int) -> None:
    with pytest.raises(MismatchError, match=rf"a vocabulary of {rows} \(rows of tok_emb.weight\), data of 60$"):
        fit_vocabulary({"raw": {EMBEDDING: torch.randn(rows, 3)}}, 60, True, "file", "data")
