"""The challenge's published data as a data folder: shards and tokenizer from the Hugging Face hub.

A published export has `manifest.json` (datasets: name, path, tokenizer_name, stats; tokenizers: name, model_path),
`datasets/fineweb10B_<variant>/fineweb_{train,val}_%06d.bin` and `tokenizers/…`, all below one folder of a dataset
repository (openai/parameter-golf, data/README.md; participants publish other vocabularies in the same layout).
Train shards are a prefix of one frozen shuffle, 100M tokens or about 200 MB each; validation always comes whole.

Files are fetched straight into the folder, and our manifest is written last: without it the folder is not a data
folder, and running the command again goes on where it stopped.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pgolf_post.base.storage import read_json
from pgolf_post.data.adopt import write_manifest
from pgolf_post.data.folder import MANIFEST_NAME, TOKENIZER_NAME, DataFolder
from pgolf_post.data.hub import RemoteFile, Repository
from pgolf_post.data.settings import REPOSITORIES, DownloadSettings
from pgolf_post.data.shard_names import ShardNames
from pgolf_post.data.shards import read_shard
from pgolf_post.errors import DamagedFileError, MismatchError, NotFoundError, PgolfError, SettingsError

ANOTHER = "--revision names another commit, --repository another publisher"


def download(out: Path, settings: DownloadSettings, *, force: bool = False) -> DataFolder:
    """Fetch a variant, or the files of it that are missing, into the data folder `out`, and open it.

    Raises NotFoundError for what is not published, DamagedFileError for bytes that are not as published, MismatchError
    for token ids that the tokenizer does not have, PgolfError if `out` holds other data (unless `force`).
    """
    remote = Repository.open(settings.endpoint, settings.source_repository, settings.revision)
    source = {
        "made_by": "pgolf-post data download",
        "repository": remote.repository,
        "revision": remote.commit,
        "variant": settings.variant,
    }
    _make_way(out, source, force)
    export = PublishedVariant.open(remote, settings)
    remote.fetch(export.tokenizer, out / TOKENIZER_NAME)
    for file in export.val + export.val_bytes + export.train:
        remote.fetch(file, out / file.name)
        read_shard(out / file.name)  # a wrong header is worth knowing before the next 200 MB
    names = {"train": export.train, "val": export.val, "val_bytes": export.val_bytes}
    shards = ShardNames(**{key: [file.name for file in files] for key, files in names.items()})
    try:
        return write_manifest(out, settings.variant, shards, source)
    except MismatchError as error:
        raise MismatchError(str(error), hint=ANOTHER) from None


class PublishedVariant:
    """The files of one variant in a published export. Open it with `PublishedVariant.open`."""

    def __init__(self, tokenizer: RemoteFile, files: Sequence[RemoteFile], train_shards: int) -> None:
        self.tokenizer = tokenizer
        self.val = _numbered(files, "fineweb_val_")
        self.val_bytes = _numbered(files, "fineweb_val_bytes_")
        self.all_train = _numbered(files, "fineweb_train_")
        self.train = self.all_train[:train_shards]

    @classmethod
    def open(cls, remote: Repository, settings: DownloadSettings) -> PublishedVariant:
        """Find a variant's files by the export's manifest. Raises NotFoundError, SettingsError, DamagedFileError."""
        root = settings.subfolder.strip("/")
        manifest = _remote_manifest(remote, _join(root, MANIFEST_NAME))
        dataset = _dataset_entry(manifest, settings, remote)
        model_path = _tokenizer_path(manifest, dataset, remote)
        folder = _join(root, str(dataset.get("path") or f"datasets/{dataset['name']}"))
        export = cls(remote.file(_join(root, model_path)), remote.files(folder), settings.train_shards)
        export._refuse_incomplete(dataset, settings, remote)
        return export

    def _refuse_incomplete(self, dataset: dict[str, Any], settings: DownloadSettings, remote: Repository) -> None:
        """Raise if the listed files are fewer than asked for, or not those that the manifest promises."""
        expected_val = int((dataset.get("stats") or {}).get("files_val", len(self.val)))
        if not self.val or len(self.val) != expected_val:
            raise DamagedFileError(
                f"{remote.repository} lists {len(self.val)} validation shards of {dataset['name']}, its manifest "
                f"promises {expected_val}; a score needs all of them",
                hint=ANOTHER,
            )
        if len(self.train) < settings.train_shards:
            raise SettingsError(
                f"train_shards = {settings.train_shards}, but {remote.repository} has {len(self.all_train)} of "
                f"{dataset['name']}",
                hint=f"--train-shards {len(self.all_train)}",
            )


def _numbered(files: Sequence[RemoteFile], prefix: str) -> list[RemoteFile]:
    """Return the files named prefix + six digits + .bin. Raises DamagedFileError if their numbers have a gap."""
    numbered = [file for file in files if re.fullmatch(re.escape(prefix) + r"\d{6}\.bin", file.name)]
    for number, file in enumerate(numbered):
        if file.name != f"{prefix}{number:06d}.bin":
            raise DamagedFileError(f"the published export has no {prefix}{number:06d}.bin before {file.path}")
    return numbered


def _join(*parts: str) -> str:
    return "/".join(part.strip("/") for part in parts if part.strip("/"))


def _remote_manifest(remote: Repository, path: str) -> dict[str, Any]:
    """Return the export's own manifest; the file is not kept."""
    with tempfile.TemporaryDirectory(prefix="pgolf-post-") as folder:
        local = Path(folder) / MANIFEST_NAME
        remote.fetch(remote.file(path), local)
        return read_json(local)


def _dataset_entry(manifest: dict[str, Any], settings: DownloadSettings, remote: Repository) -> dict[str, Any]:
    """Return the variant's entry among `datasets`. Raises NotFoundError that lists the variants there are."""
    entries = [entry for entry in manifest.get("datasets", []) if isinstance(entry, dict) and "name" in entry]
    for entry in entries:
        if entry["name"] == f"fineweb10B_{settings.variant}":
            return entry
    variants = [str(entry["name"]).removeprefix("fineweb10B_") for entry in entries]
    known = REPOSITORIES.get(settings.variant, remote.repository)
    raise NotFoundError(
        f"{remote.repository} does not publish variant {settings.variant!r}; it has: {', '.join(variants) or 'none'}",
        hint=f"--repository {known}" if known != remote.repository else "--repository OWNER/NAME of who publishes it",
    )


def _tokenizer_path(manifest: dict[str, Any], dataset: dict[str, Any], remote: Repository) -> str:
    """Return the path of the dataset's sentencepiece model. Raises NotFoundError if none is published."""
    name = dataset.get("tokenizer_name")
    for entry in manifest.get("tokenizers", []):
        if entry.get("name") == name and str(entry.get("model_path", "")).endswith(".model"):
            return str(entry["model_path"])
    raise NotFoundError(
        f"{remote.repository}: {dataset['name']} has tokenizer {name!r}, for which no sentencepiece .model is published"
    )


def _make_way(out: Path, source: dict[str, Any], force: bool) -> None:
    """Raise PgolfError if `out` holds other data and `force` is False; with `force`, delete its manifest."""
    if out.exists() and not out.is_dir():
        raise PgolfError(f"{out} is a file, not a folder", hint="--out names another")
    manifest_path = out / MANIFEST_NAME
    if not manifest_path.is_file():
        return
    present = read_json(manifest_path).get("source", {})
    differing = [key for key, value in source.items() if present.get(key) != value]
    if not differing:
        return
    if not force:
        key = differing[0]
        raise PgolfError(
            f"{out} holds other data: its {key} is {present.get(key)!r}, this would be {source[key]!r}",
            hint="--out names another folder, --force replaces the files of this one",
        )
    manifest_path.unlink()  # from here until the new manifest the folder is not a data folder
