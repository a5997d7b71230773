"""Downloading from a hub on 127.0.0.1 that speaks the hub's API: pinning, resuming, verifying, refusing."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest

from pgolf_post.data import hub
from pgolf_post.data.check import check
from pgolf_post.data.download import download
from pgolf_post.data.folder import DataFolder
from pgolf_post.data.settings import DownloadSettings
from pgolf_post.data.shard_kinds import HEADER_BYTES
from pgolf_post.data.shards import read_shard, write_shard
from pgolf_post.errors import DamagedFileError, MismatchError, NotFoundError, PgolfError, SettingsError
from tests.small_disk import files_of_at_most

REPOSITORY = "someone/golf"
COMMIT = "c0ffee" * 6 + "c0de"
ROOT = "datasets"
TRAIN = f"{ROOT}/datasets/fineweb10B_sp400/fineweb_train_000000.bin"
VAL = f"{ROOT}/datasets/fineweb10B_sp400/fineweb_val_000000.bin"
VAL_BYTES = f"{ROOT}/datasets/fineweb10B_sp400/fineweb_val_bytes_000000.bin"


class Hub:
    """The repository's files and the server's faults, and what was asked of it."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.served: dict[str, bytes] = {}  # other bytes than the listing states
        self.cuts: dict[str, list[int]] = {}  # path -> bytes after which the next answers break off
        self.statuses: dict[str, list[int]] = {}  # path -> statuses of the next answers; 0 answers normally
        self.ranges: list[tuple[str, str]] = []  # (path, Range header)
        self.downloads: list[str] = []
        self.authorized = False
        self.endpoint = ""

    def tree(self, folder: str) -> list[dict[str, Any]]:
        """The files directly in `folder`, as the hub lists them: .bin and .model files are in large-file storage."""
        names = [path for path in self.files if path.rpartition("/")[0] == folder]
        return [self._entry(path, self.files[path]) for path in names]

    def _entry(self, path: str, data: bytes) -> dict[str, Any]:
        blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": blob}
        if path.endswith((".bin", ".model")):
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        return entry


class Handler(BaseHTTPRequestHandler):
    """GET for the repository's revision, its tree, and its files; large files by a redirect, as the hub does."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.authorized |= "authorization" in self.headers
        api, tree = f"/api/datasets/{REPOSITORY}/revision/", f"/api/datasets/{REPOSITORY}/tree/{COMMIT}/"
        resolve, storage = f"/datasets/{REPOSITORY}/resolve/{COMMIT}/", "/storage/"
        if path in (api + "main", api + COMMIT):
            self._json({"id": REPOSITORY, "sha": COMMIT, "siblings": [], "tags": [], "downloads": 0, "private": False})
        elif path.startswith(tree) and (listing := self.hub.tree(path.removeprefix(tree))):
            self._json(listing)
        elif path.startswith(resolve) and path.removeprefix(resolve) in self.hub.files:
            self._resolve(path.removeprefix(resolve))
        elif path.startswith(storage) and path.removeprefix(storage) in self.hub.files:
            self._file(path.removeprefix(storage))
        else:
            self._empty(404)

    def _resolve(self, name: str) -> None:
        if not name.endswith(".bin"):
            self._file(name)
            return
        self.send_response(302)
        self.send_header("Location", f"{self.hub.endpoint}/storage/{name}")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _file(self, name: str) -> None:
        self.hub.downloads.append(name)
        if planned := self.hub.statuses.get(name):
            status = planned.pop(0)
            if status:
                self._empty(status)
                return
        data = self.hub.served.get(name, self.hub.files[name])
        start = 0
        if asked := self.headers.get("Range"):
            self.hub.ranges.append((name, asked))
            start = int(asked.removeprefix("bytes=").rstrip("-"))
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        cuts = self.hub.cuts.get(name)
        end = cuts.pop(0) if cuts else len(data)
        self.wfile.write(data[start:end])
        self.close_connection = end < len(data)

    def _json(self, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _empty(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on stderr."""


@pytest.fixture
def server(built: DataFolder, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that publishes the built folder in the challenge's layout."""
    state = Hub()
    entry = {"name": "fineweb10B_sp400", "path": "datasets/fineweb10B_sp400", "tokenizer_name": "sp_bpe_400"}
    entry["stats"] = {"files_train": len(built.shard_paths("train")), "files_val": len(built.shard_paths("val"))}
    tokenizer = {"name": "sp_bpe_400", "model_path": "tokenizers/fineweb_400_bpe.model"}
    manifest = {"version": "1", "datasets": [entry], "tokenizers": [{"name": "other"}, tokenizer]}
    state.files[f"{ROOT}/manifest.json"] = json.dumps(manifest).encode()
    state.files[f"{ROOT}/tokenizers/fineweb_400_bpe.model"] = (built.path / "tokenizer.model").read_bytes()
    for path in built.shard_paths("train") + built.shard_paths("val"):
        state.files[f"{ROOT}/datasets/fineweb10B_sp400/{path.name}"] = path.read_bytes()
    handler = type("BoundHandler", (Handler,), {"hub": state})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        state.endpoint = f"http://127.0.0.1:{httpd.server_address[1]}"
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        monkeypatch.setattr(hub, "FIRST_WAIT_S", 0.01)
        yield state
        httpd.shutdown()
        thread.join()


def settings_for(server: Hub, **changes: Any) -> DownloadSettings:
    return DownloadSettings(**{"variant": "sp400", "repository": REPOSITORY, "endpoint": server.endpoint, **changes})


def test_download_gives_the_published_data(server: Hub, built: DataFolder, tmp_path: Path) -> None:
    folder = download(tmp_path / "out", settings_for(server, train_shards=2))
    assert np.array_equal(folder.tokens("val"), built.tokens("val"))
    assert np.array_equal(folder.tokens("train"), built.tokens("train")[:40_000])
    assert folder.manifest["splits"]["val"] == built.manifest["splits"]["val"]
    assert folder.manifest["source"]["revision"] == COMMIT
    assert folder.manifest["source"]["val_bytes_from"] == "byte table"
    assert [row for row in check(folder) if not row.passed] == []
    assert {path.name for path in folder.path.iterdir()} == {*folder.file_names(), "manifest.json"}
    assert not server.authorized


def test_environment_does_not_choose_the_hub(server: Hub, tmp_path: Path) -> None:
    """In a process of its own, since huggingface_hub reads its variables when it is imported."""
    options = ["--variant", "sp400", "--repository", REPOSITORY, "--endpoint", server.endpoint, "--json"]
    program = [sys.executable, "-m", "pgolf_post", "data", "download", "--out", str(tmp_path / "out"), *options]
    misleading = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": "hf_secret", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(program, env={**os.environ, **misleading}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (answer,) = done.stdout.splitlines()
    assert json.loads(answer)["manifest_sha256"] == DataFolder.open(tmp_path / "out").manifest_sha256
    assert not server.authorized


def test_more_train_shards_add_to_what_is_there(server: Hub, tmp_path: Path) -> None:
    download(tmp_path / "out", settings_for(server, train_shards=0))
    server.downloads.clear()
    folder = download(tmp_path / "out", settings_for(server, train_shards=1))
    assert server.downloads == [f"{ROOT}/manifest.json", TRAIN]
    assert folder.manifest["splits"]["train"]["num_tokens"] == 20_000


@pytest.fixture
def long_shard(server: Hub, built: DataFolder, tmp_path: Path) -> bytes:
    """A first train shard of 30 MB: huggingface_hub hands over 10 MB at a time, so shorter ones start anew."""
    write_shard(tmp_path / "long.bin", np.resize(built.tokens("train"), 15_000_000))
    server.files[TRAIN] = (tmp_path / "long.bin").read_bytes()
    return server.files[TRAIN]


def test_a_cut_connection_is_resumed(server: Hub, long_shard: bytes, tmp_path: Path) -> None:
    server.cuts[TRAIN] = [25_000_000]
    folder = download(tmp_path / "out", settings_for(server))
    assert server.ranges == [(TRAIN, "bytes=20971520-")]
    assert (folder.path / Path(TRAIN).name).read_bytes() == long_shard


def test_an_interrupted_download_is_resumed_by_the_next_one(server: Hub, long_shard: bytes, tmp_path: Path) -> None:
    out = tmp_path / "out"
    server.cuts[TRAIN] = [25_000_000]
    server.statuses[TRAIN] = [0, 403]
    with pytest.raises(NotFoundError, match="HTTP 403"):
        download(out, settings_for(server))
    with pytest.raises(NotFoundError, match="not a data folder"):
        DataFolder.open(out)
    assert [path.stat().st_size for path in out.glob(".partial-*")] == [20_971_520]
    server.ranges.clear()
    folder = download(out, settings_for(server))
    assert server.ranges == [(TRAIN, "bytes=20971520-")]
    assert (folder.path / Path(TRAIN).name).read_bytes() == long_shard
    assert list(out.glob(".partial-*")) == []


@pytest.mark.parametrize("file_bytes", [0, 3000])
def test_a_full_disk_is_said_at_once_and_what_arrived_is_used(server: Hub, tmp_path: Path, file_bytes: int) -> None:
    with (
        files_of_at_most(file_bytes),
        pytest.raises(PgolfError, match=r"could not write.* File too large") as caught,
    ):
        download(tmp_path / "out", settings_for(server))
    assert "space" in (caught.value.hint or "") or "larger files" in (caught.value.hint or "")
    assert not (tmp_path / "out" / "manifest.json").exists()
    download(tmp_path / "out", settings_for(server))
    assert (file_bytes == 0) == (not server.ranges)  # the second one goes on where the first stopped


def test_a_busy_server_is_asked_again(server: Hub, tmp_path: Path) -> None:
    server.statuses[VAL] = [503, 500]
    download(tmp_path / "out", settings_for(server))
    assert server.downloads.count(VAL) == 3


def test_corrupted_bytes_are_refused(server: Hub, tmp_path: Path) -> None:
    good = server.files[VAL]
    server.served[VAL] = good[:-1] + bytes([good[-1] ^ 1])
    with pytest.raises(DamagedFileError, match=r"fineweb_val_000000\.bin arrived with other bytes"):
        download(tmp_path / "out", settings_for(server))
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"tokenizer.model"}
    server.served.clear()
    assert download(tmp_path / "out", settings_for(server)).vocab_size == 400


def test_a_damaged_local_file_is_fetched_again(server: Hub, tmp_path: Path) -> None:
    folder = download(tmp_path / "out", settings_for(server))
    path = folder.path / Path(VAL).name
    path.write_bytes(path.read_bytes()[:-2] + b"xx")
    download(tmp_path / "out", settings_for(server))
    assert path.read_bytes() == server.files[VAL]


def test_a_published_file_that_is_no_shard(server: Hub, tmp_path: Path) -> None:
    server.files[VAL] = bytes(HEADER_BYTES)
    with pytest.raises(DamagedFileError, match="magic 0"):
        download(tmp_path / "out", settings_for(server))


def test_byte_sidecars_are_fetched_and_used(server: Hub, built: DataFolder, tmp_path: Path) -> None:
    entries = built.token_bytes("val", built.tokens("val"))
    write_shard(tmp_path / "bytes.bin", entries)
    server.files[VAL_BYTES] = (tmp_path / "bytes.bin").read_bytes()
    folder = download(tmp_path / "out", settings_for(server))
    assert folder.manifest["splits"]["val"]["num_bytes"] == int(entries.sum())
    assert np.array_equal(folder.token_bytes("val", folder.tokens("val")), entries)
    assert folder.manifest["source"]["val_bytes_from"] == "byte sidecar"
    write_shard(tmp_path / "short.bin", entries[:-1])
    server.files[VAL_BYTES] = (tmp_path / "short.bin").read_bytes()
    with pytest.raises(MismatchError, match="its byte sidecar"):
        download(tmp_path / "other", settings_for(server))


def test_tokens_that_the_tokenizer_does_not_have(server: Hub, built: DataFolder, tmp_path: Path) -> None:
    tokens = np.array(read_shard(built.shard_paths("val")[0]))
    tokens[3] = 400
    write_shard(tmp_path / "bad.bin", tokens)
    server.files[VAL] = (tmp_path / "bad.bin").read_bytes()
    with pytest.raises(MismatchError, match="token id 400 at position 3"):
        download(tmp_path / "out", settings_for(server))


def test_a_published_copy_of_a_shard_is_refused(server: Hub, tmp_path: Path) -> None:
    server.files[TRAIN] = server.files[VAL]
    with pytest.raises(MismatchError, match="has the same tokens as") as caught:
        download(tmp_path / "out", settings_for(server))
    assert "--repository" in (caught.value.hint or "")


def test_what_is_not_published_is_named(server: Hub, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(NotFoundError, match="does not publish variant 'sp8192'; it has: sp400") as unknown:
        download(out, settings_for(server, variant="sp8192"))
    assert unknown.value.hint == "--repository kevclark/parameter-golf"
    with pytest.raises(SettingsError, match="train_shards = 99, but someone/golf has"):
        download(out, settings_for(server, train_shards=99))
    with pytest.raises(NotFoundError, match=r"nobody/nothing .*HTTP 40"):
        download(out, settings_for(server, repository="nobody/nothing"))
    with pytest.raises(NotFoundError, match="elsewhere"):
        download(out, settings_for(server, subfolder="elsewhere"))
    with pytest.raises(NotFoundError, match="no-such-branch"):
        download(out, settings_for(server, revision="no-such-branch"))
    del server.files[VAL]
    with pytest.raises(DamagedFileError, match="lists 0 validation shards"):
        download(out, settings_for(server))
    assert not out.exists()


def test_other_data_is_not_overwritten(server: Hub, built: DataFolder, tmp_path: Path) -> None:
    before = built.manifest_sha256
    with pytest.raises(PgolfError, match="holds other data"):
        download(built.path, settings_for(server))
    assert DataFolder.open(built.path).manifest_sha256 == before


def test_without_the_extra(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(PgolfError) as missing:
        download(tmp_path / "out", settings_for(server))
    assert missing.value.hint == "pip install 'pgolf-post[data]'"


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (ConnectionResetError("reset"), True),
        (TimeoutError("slow"), True),
        (OSError(errno.ENOSPC, "full"), False),
        (PermissionError(errno.EACCES, "no"), False),
        (ValueError("wrong"), False),
    ],
)
def test_only_what_can_pass_is_tried_again(error: Exception, again: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "FIRST_WAIT_S", 0.0)
    attempts = []

    def failing() -> None:
        attempts.append(1)
        raise error

    with pytest.raises(PgolfError, match="the file"):
        hub.with_retries("the file", failing)
    assert len(attempts) == (hub.MAX_ATTEMPTS if again else 1)


def test_positions_may_go_back() -> None:
    shown: list[float] = []
    report = hub._position_reporter(shown.append)
    for position in (0, 10_000_000, 10_000_000, 4_000_000, 30_000_000):
        report(position)
    assert sum(shown) == 30.0
