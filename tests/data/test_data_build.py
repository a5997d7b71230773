"""Building: exact bytes, a clean split, the same folder from the same inputs, all of it or nothing."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from click.testing import CliRunner

from pgolf_post.cli.data import command
from pgolf_post.data.adopt import adopt
from pgolf_post.data.build import build
from pgolf_post.data.check import check
from pgolf_post.data.corpus import Corpus, key_position
from pgolf_post.data.documents import Document
from pgolf_post.data.folder import DataFolder, Split
from pgolf_post.data.settings import BuildSettings
from pgolf_post.data.shards import read_shard
from pgolf_post.data.tokenizer import BOS_ID
from pgolf_post.errors import DamagedFileError, MismatchError, PgolfError, SettingsError

SPLITS: tuple[Split, ...] = ("train", "val")
SMALL = BuildSettings(name="small", vocab_size=400, val_fraction=0.2, tokens_per_shard=20_000)


def texts_of(folder: DataFolder, split: Split) -> list[str]:
    """A split's documents, decoded."""
    tokens = folder.tokens(split)
    parts = np.split(tokens, np.flatnonzero(tokens == BOS_ID)[1:])
    return [folder.tokenizer.decode(part[1:].tolist()) for part in parts]


def test_a_built_folder_holds_its_documents(built: DataFolder, documents: list[Document]) -> None:
    decoded = texts_of(built, "train") + texts_of(built, "val")
    assert sorted(decoded) == sorted(document.text.lstrip(" ") for document in documents)
    assert built.manifest["source"]["stripped_leading_spaces"] == sum(
        len(document.text) - len(document.text.lstrip(" ")) for document in documents
    )


def test_bytes_are_those_of_the_text(built: DataFolder) -> None:
    for split in SPLITS:
        tokens = built.tokens(split)
        num_bytes = sum(len(text.encode("utf-8")) for text in texts_of(built, split))
        assert built.manifest["splits"][split]["num_bytes"] == num_bytes
        assert int(built.token_bytes(split, tokens).sum()) == num_bytes


def test_shards_are_full_but_the_last(built: DataFolder) -> None:
    sizes = [len(read_shard(path)) for path in built.shard_paths("train")]
    assert len(sizes) > 1
    assert sizes[:-1] == [20_000] * (len(sizes) - 1)
    assert 0 < sizes[-1] <= 20_000
    assert [path.name for path in built.shard_paths("train")][:2] == [
        "fineweb_train_000000.bin",
        "fineweb_train_000001.bin",
    ]


def test_same_inputs_same_manifest(built: DataFolder, documents: list[Document], tmp_path: Path) -> None:
    shuffled = documents[::-1]
    again = build(shuffled, tmp_path / "again", SMALL.model_copy(update={"num_threads": 1}))
    assert again.manifest == built.manifest
    assert again.manifest_sha256 == built.manifest_sha256


def test_the_split_is_by_key(documents: list[Document]) -> None:
    corpus = Corpus.split([*documents, Document(documents[0].key, "more of it")], None, 0.3)
    train, val = {document.key for document in corpus.train}, {document.key for document in corpus.val}
    assert not train & val
    assert all(key_position(key) < 0.3 for key in val)
    larger = Corpus.split([*documents, Document("new", "new")], None, 0.3)
    assert {document.key for document in corpus.val} <= {document.key for document in larger.val} | {"new"}


def test_explicit_validation_documents(documents: list[Document], tmp_path: Path) -> None:
    settings = SMALL.model_copy(update={"vocab_size": 350})
    folder = build(documents[2:], tmp_path / "a", settings, val_documents=documents[:2])
    assert sorted(texts_of(folder, "val")) == sorted(document.text.lstrip(" ") for document in documents[:2])
    with pytest.raises(MismatchError, match="also in train"):
        build(documents, tmp_path / "b", settings, val_documents=documents[:1])
    assert not (tmp_path / "b").exists()


def test_sidecar_of_a_normalising_tokenizer(documents: list[Document], normalising_model: Path, tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match="the tokenizer changes the text"):
        build(documents, tmp_path / "a", SMALL, tokenizer_path=normalising_model)
    assert list(tmp_path.iterdir()) == []
    settings = SMALL.model_copy(update={"byte_sidecar": True, "tokens_per_shard": 3000})
    folder = build(documents, tmp_path / "a", settings, tokenizer_path=normalising_model)
    val = [document.text.lstrip(" ") for document in Corpus.split(documents, None, 0.2).val]
    tokens = folder.tokens("val")
    counts = folder.token_bytes("val", tokens)
    per_document = [int(part.sum()) for part in np.split(counts, np.flatnonzero(tokens == BOS_ID)[1:])]
    assert per_document == [len(text.encode("utf-8")) for text in val]
    assert len(folder.manifest["splits"]["val"]["byte_sidecars"]) == len(folder.shard_paths("val"))
    assert all(row.passed for row in check(folder))


def test_sidecar_of_a_lossless_tokenizer_is_the_byte_table(built: DataFolder, documents: list[Document]) -> None:
    out = built.path.with_name("sidecar")
    folder = build(documents, out, SMALL.model_copy(update={"byte_sidecar": True}))
    tokens = folder.tokens("val")
    assert np.array_equal(folder.token_bytes("val", tokens), built.token_bytes("val", built.tokens("val")))
    assert all(row.passed for row in check(folder))


def test_what_cannot_be_built(documents: list[Document], normalising_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "x"
    with pytest.raises(PgolfError, match="there is only one document"):
        build(documents[:1], out, BuildSettings(val_fraction=0.5))
    one_path = [Document("one", text) for text in ("a", "b", "c")]
    with pytest.raises(PgolfError, match="all 3 documents have one key, one, and stay together") as caught:
        build(one_path, out, SMALL)
    assert 'leave out "path"' in (caught.value.hint or "")
    with pytest.raises(PgolfError, match="hold no text"):
        build([Document("a", "   ")], out, SMALL)
    with pytest.raises(SettingsError, match="at most"):
        build(documents, out, SMALL.model_copy(update={"vocab_size": 60_000}))
    settings = SMALL.model_copy(update={"byte_sidecar": True})
    with pytest.raises(MismatchError, match="drops all of document zero"):
        build(
            documents[1:], out, settings, val_documents=[Document("zero", "\u200b")], tokenizer_path=normalising_model
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fraction", [1e-6, 1 - 1e-6])
def test_the_printed_fraction_splits_the_documents(documents: list[Document], fraction: float) -> None:
    with pytest.raises(PgolfError, match="no document came into") as caught:
        Corpus.split(documents, None, fraction)
    enough = float((caught.value.hint or "").split(",")[0].removeprefix("--val-fraction "))
    corpus = Corpus.split(documents, None, enough)
    assert min(len(corpus.train), len(corpus.val)) == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"version": "1.0", "model": {"type": "BPE"}}', "it is JSON, such as the tokenizer.json"),
        (b"version https://git-lfs.github.com/spec/v1\n", "it is a Git LFS pointer"),
        (b"<!DOCTYPE html>", "it is an HTML page"),
        (b"a\nb\n", "it is text"),
        (b"", "it is empty"),
        (b"\x80\x02\x00\x01", "its first bytes are 80 02 00 01"),
    ],
)
def test_a_tokenizer_of_another_kind_is_named(
    documents: list[Document], tmp_path: Path, content: bytes, words: str
) -> None:
    (tmp_path / "t.model").write_bytes(content)
    with pytest.raises(DamagedFileError, match=f"is not a sentencepiece model: {words}") as caught:
        build(documents, tmp_path / "out", SMALL, tokenizer_path=tmp_path / "t.model")
    assert "--tokenizer FILE.model" in (caught.value.hint or "")
    assert not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    def unread() -> Iterator[Document]:
        pytest.fail("the documents were read")
        yield Document("", "")

    (tmp_path / "file").write_text("x")
    with pytest.raises(PgolfError, match=r"could not write .*/file/out: ") as caught:
        build(unread(), tmp_path / "file" / "out", SMALL)
    assert caught.value.hint == "name another path for it"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_vocabulary_that_cannot_spell_the_training_text_is_said_and_checks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["plain words alone"] * 30), model_writer=model, model_type="unigram", vocab_size=24,
        hard_vocab_limit=False, normalization_rule_name="identity", remove_extra_whitespaces=False,
        add_dummy_prefix=False, pad_id=0, bos_id=1, eos_id=2, unk_id=3, num_threads=1, minloglevel=2,
    )  # fmt: skip
    (tmp_path / "words.model").write_bytes(model.getvalue())
    spelled, foreign = Document("a", "plain words alone"), Document("b", "plain ß words")
    build([foreign], tmp_path / "out", SMALL, val_documents=[spelled], tokenizer_path=tmp_path / "words.model")
    assert "the tokenizer changes the training text: 14 bytes of text, 11 by the byte table" in capsys.readouterr().err
    folder = DataFolder.open(tmp_path / "out")
    assert [row for row in check(folder) if not row.passed] == []
    for path in folder.path.glob("fineweb_train_*.bin"):
        (folder.path / "fineweb_val_000001.bin").write_bytes(path.read_bytes())
        path.unlink()
    adopt(folder.path, folder.path / "tokenizer.model", tmp_path / "adopted", "x")
    assert "1 of" in (said := capsys.readouterr().err)
    assert "unknown pieces: the text they stand for counts 0 bytes" in said


def test_only_data_folders_are_replaced(built: DataFolder, documents: list[Document], tmp_path: Path) -> None:
    out = tmp_path / "folder"
    shutil.copytree(built.path, out)
    with pytest.raises(PgolfError, match="already exists"):
        build(documents, out, SMALL)
    assert build(documents[1:], out, SMALL, force=True).manifest != built.manifest
    (out / "manifest.json").unlink()
    with pytest.raises(PgolfError, match="not a data folder"):
        build(documents, out, SMALL, force=True)
    assert (out / "tokenizer.model").is_file()


def test_command_line(documents: list[Document], tmp_path: Path) -> None:
    source = tmp_path / "docs.jsonl"
    source.write_text("".join(json.dumps({"text": document.text}) + "\n" for document in documents), encoding="utf-8")
    runner = CliRunner()
    options = ["--vocab-size", "400", "--val-fraction", "0.2", "--out", str(tmp_path / "out"), "--json"]
    result = runner.invoke(command, ["build", str(source), *options], catch_exceptions=False)
    assert result.exit_code == 0
    answer = json.loads(result.stdout.splitlines()[-1])
    folder = DataFolder.open(tmp_path / "out")
    assert answer["manifest_sha256"] == folder.manifest_sha256
    assert answer["splits"]["train"]["num_tokens"] == len(folder.tokens("train"))
    assert folder.manifest["source"]["inputs"][0]["file"] == "docs.jsonl"
    assert str(tmp_path) not in json.dumps(folder.manifest)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["a.txt", "--stdlib"],
        ["a.txt", "--tokenizer", "m", "--vocab-size", "9"],
        ["a", "--val", "b", "--val-fraction", "1"],
    ],
)
def test_contradicting_options(arguments: list[str]) -> None:
    assert CliRunner().invoke(command, ["build", *arguments]).exit_code == 2
