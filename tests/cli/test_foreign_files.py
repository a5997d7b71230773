"""A file that is no artifact of ours is said to be what it is, with the command that takes it."""

from __future__ import annotations

import bz2
import gzip
import lzma
from pathlib import Path

import brotli
import pytest
import torch
import zstandard
from safetensors.torch import save

from tests.cli.conftest import Call

CONTENT = bytes(range(256)) * 8
FILES = {
    "xz": (lzma.compress(CONTENT), "an xz stream (lzma)", "pgolf-post repack"),
    "bz2": (bz2.compress(CONTENT), "a bzip2 stream", "pgolf-post repack"),
    "gzip": (gzip.compress(CONTENT), "a gzip stream", "pgolf-post repack"),
    "zstd": (zstandard.compress(CONTENT), "a zstd stream", "pgolf-post repack"),
    "lrzip": (b"LRZI" + CONTENT, "an lrzip stream", "pgolf-post repack"),
    "brotli": (brotli.compress(CONTENT), "of no kind that is known here", "pgolf-post repack"),
    "safetensors": (save({"w": torch.ones(2)}), "a safetensors file", "pgolf-post import"),
    "empty": (b"", "empty (0 bytes)", "download it again"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\n", "a git-LFS pointer", "git lfs pull"),
    "text": (b"step:100 loss:2.3\n", "text", "artifact.pgolf"),
}


@pytest.mark.parametrize("suffix", [".ptz", ".pgolf"])
@pytest.mark.parametrize("kind", FILES)
def test_eval_and_compress_say_what_a_file_is(pgolf: Call, tmp_path: Path, kind: str, suffix: str) -> None:
    content, words, hint = FILES[kind]
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    for command in ("eval", "compress"):
        answer = pgolf(command, path)
        assert answer.code == 1
        said = " ".join(answer.err.split())
        assert f"is {words}" in said
        assert "not an artifact of pgolf-post" in said
        assert hint in said


def test_size_counts_any_file_and_says_what_it_is(pgolf: Call, tmp_path: Path) -> None:
    path = tmp_path / "final_model.int6.ptz"
    path.write_bytes(FILES["xz"][0])
    answer = pgolf("size", path, "--json")
    assert answer.code == 0
    assert answer.json["artifact_bytes"] == len(FILES["xz"][0])
    assert "an xz stream (lzma): counted as it is" in " ".join(answer.err.split())
