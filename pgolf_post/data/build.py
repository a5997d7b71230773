"""Building a data folder: documents in; a tokenizer, token shards and a manifest out, all of it or nothing.

corpus.py splits and orders the documents, write_split.py makes a split's shards. The same inputs give the same
manifest, byte for byte.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pgolf_post.base.progress import say
from pgolf_post.base.storage import atomic_folder, require_writable, sha256_file, write_json
from pgolf_post.data.corpus import Corpus
from pgolf_post.data.documents import Document
from pgolf_post.data.encode import Encoder
from pgolf_post.data.folder import FORMAT_VERSION, MANIFEST_NAME, TOKENIZER_NAME, DataFolder
from pgolf_post.data.repeats import hashes_of_texts, say_repeats
from pgolf_post.data.settings import MAX_VOCAB_SIZE, BuildSettings
from pgolf_post.data.tokenizer import load_tokenizer
from pgolf_post.data.train_tokenizer import train_tokenizer
from pgolf_post.data.write_split import write_split
from pgolf_post.errors import PgolfError, SettingsError


def build(
    documents: Iterable[Document],
    out: Path,
    settings: BuildSettings,
    *,
    val_documents: Iterable[Document] | None = None,
    tokenizer_path: Path | None = None,
    source: Mapping[str, Any] | None = None,
    force: bool = False,
) -> DataFolder:
    """Write the data folder `out` and open it. `source` goes into the manifest as it is.

    Raises PgolfError if `out` exists (unless `force`) or a split comes out empty, SettingsError for a vocabulary that
    the text cannot fill, MismatchError for a tokenizer that does not fit or a document in both splits.
    """
    refuse_destination(out, force)
    if tokenizer_path is not None:
        _refuse_tokenizer(tokenizer_path)
    corpus = Corpus.split(documents, val_documents, settings.val_fraction)
    if corpus.num_empty_documents:
        say(f"{corpus.num_empty_documents:,} documents without text were left out")
    say_repeats(hashes_of_texts(corpus.train), hashes_of_texts(corpus.val))
    with atomic_folder(out, replace=force) as folder:
        model_path = folder / TOKENIZER_NAME
        model_path.write_bytes(_model_bytes(corpus, settings, tokenizer_path))
        encoder = Encoder.of(load_tokenizer(model_path), settings.num_threads)
        splits = {
            "val": write_split(folder, "val", corpus.val, encoder, settings),
            "train": write_split(folder, "train", corpus.train, encoder, settings),
        }
        manifest = _manifest(settings, model_path, encoder, corpus, splits, source, tokenizer_path is None)
        write_json(folder / MANIFEST_NAME, manifest)
    return DataFolder.open(out)


def refuse_destination(out: Path, force: bool) -> None:
    """Raise PgolfError if `out` exists and `force` is False, if it is no data folder, or if it could not be written."""
    if not out.exists():
        require_writable(out)
        return
    if not force:
        raise PgolfError(f"{out} already exists; nothing was written", hint="--force replaces it, --out names another")
    if not out.is_dir() or (any(out.iterdir()) and not (out / MANIFEST_NAME).is_file()):
        raise PgolfError(f"{out} is not a data folder; nothing was written", hint="--out names another")
    require_writable(out)


def _model_bytes(corpus: Corpus, settings: BuildSettings, tokenizer_path: Path | None) -> bytes:
    """Return the bytes of the given .model file, or of one trained on the head of the training split."""
    if tokenizer_path is None:
        say(f"training a tokenizer of {settings.vocab_size} pieces")
        texts = (document.text for document in corpus.train)
        return train_tokenizer(texts, settings.vocab_size, settings.tokenizer_sample_bytes)
    return tokenizer_path.read_bytes()


def _refuse_tokenizer(path: Path) -> None:
    """Raise SettingsError for a vocabulary that tokens cannot count, MismatchError for another BOS id."""
    tokenizer = load_tokenizer(path)
    if tokenizer.vocab_size() > MAX_VOCAB_SIZE:
        raise SettingsError(
            f"{path} has {tokenizer.vocab_size()} pieces, a shard's tokens allow at most {MAX_VOCAB_SIZE}",
            hint="leave out --tokenizer to train a smaller one on the text",
        )
    Encoder.of(tokenizer)


def _manifest(
    settings: BuildSettings,
    model_path: Path,
    encoder: Encoder,
    corpus: Corpus,
    splits: Mapping[str, Any],
    source: Mapping[str, Any] | None,
    is_trained: bool,
) -> dict[str, Any]:
    """Return the folder's manifest. Nothing in it depends on when, where or how fast it was built."""
    import sentencepiece

    return {
        "format_version": FORMAT_VERSION,
        "name": settings.name,
        "tokenizer": {
            "file": model_path.name,
            "sha256": sha256_file(model_path),
            "vocab_size": encoder.tokenizer.vocab_size(),
        },
        "splits": {"train": splits["train"], "val": splits["val"]},
        "source": {
            "made_by": "pgolf-post data build",
            **(source or {}),
            "settings": _recorded(settings, is_trained),
            "sentencepiece": sentencepiece.__version__,
            "stripped_leading_spaces": corpus.num_stripped_spaces,
            "empty_documents": corpus.num_empty_documents,
        },
    }


def _recorded(settings: BuildSettings, is_trained: bool) -> dict[str, Any]:
    """Return the settings that decided the folder's contents."""
    unused = {"name", "num_threads"} | (set() if is_trained else {"vocab_size", "tokenizer_sample_bytes"})
    return settings.model_dump(exclude=unused)


def describe_inputs(paths: Sequence[Path]) -> list[dict[str, str]]:
    """Return name and sha256 of input files, as the manifest records them; not their folders."""
    return [{"file": path.name, "sha256": sha256_file(path)} for path in paths]
