"""A file that is something else than its name says is called what it is, with the next step."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import pickle
import re
import tarfile
import zipfile
import zlib
from pathlib import Path

import brotli
import numpy as np
import pytest
import torch
import zstandard
from safetensors.torch import save

from pgolf_post.base.file_kinds import file_kind
from pgolf_post.errors import DamagedFileError, NotFoundError, PgolfError
from pgolf_post.importers.foreign_file import read_foreign
from pgolf_post.importers.repack import read_foreign_artifact
from tests.importers.test_repack import int8_artifact, saved

STATE = {"tok_emb.weight": torch.ones(2, 3)}
WHOLE = saved(STATE)


def written(kind: str) -> bytes:
    buffer = io.BytesIO()
    if kind == "npz":
        np.savez(buffer, **{name: tensor.numpy() for name, tensor in STATE.items()})
    elif kind == "zip":
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("readme.txt", "hello")
    elif kind == "tar":
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            member = tarfile.TarInfo("m.pt")
            member.size = len(WHOLE)
            archive.addfile(member, io.BytesIO(WHOLE))  # its directory of a zip is near the end
    return buffer.getvalue()


OTHERS = {  # bytes of a .pt file: what it is called, what to do
    "empty": (b"", r"empty \(0 bytes\)", "download it again"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\n", "git-LFS pointer", "git lfs pull"),
    "html": (b"<!DOCTYPE html><html>404</html>", "HTML page", "/resolve/"),
    "html in capitals": (b"\n  <HTML><body>", "HTML page", "/resolve/"),
    "gzip": (gzip.compress(WHOLE), "gzip stream", "gzip -dc"),
    "bzip2": (bz2.compress(WHOLE), "bzip2 stream", "bzip2 -dc"),
    "xz": (lzma.compress(WHOLE), "xz stream", "xz -dc"),
    "lzma": (lzma.compress(WHOLE, format=lzma.FORMAT_ALONE), "lzma stream", "--format=lzma"),
    "zstd": (zstandard.compress(WHOLE), "zstd stream", "zstd -dc"),
    "pickle": (pickle.dumps({"a": 1}), "plain pickle", r"torch.save\(model.state_dict"),
    "npz": (written("npz"), "npz file", "numpy.load"),
    "zip": (written("zip"), "zip file without a file of torch.save", "unzip"),
    "tar": (written("tar"), "tar archive", "tar -xf"),
    "cut": (WHOLE[: len(WHOLE) // 2], "zip file, cut short", "download it again"),
    "ours": (b"PGLF\2....", "artifact of pgolf-post", "pgolf-post show"),
    "text": (b"step 1 loss 2\n", "text, not a file of weights", "--log"),
    "gguf": (b"GGUF\3\0\0\0", "GGUF", "torch.save"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_file_of_another_kind_is_called_what_it_is(tmp_path: Path, name: str, suffix: str) -> None:
    content, words, hint = OTHERS[name]
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    with pytest.raises(DamagedFileError, match=rf"model\{suffix} cannot be read as tensors.*{words}") as caught:
        read_foreign(path)
    assert torch_is_silent(caught.value)
    assert re.search(hint, str(caught.value.hint))
    if content:
        assert content[:4].hex(" ") in str(caught.value)


def torch_is_silent(error: PgolfError) -> bool:
    return not any(word in f"{error} {error.hint}" for word in ("weights_only", "likely succeed", "enforce fail"))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".bin", ""])
@pytest.mark.parametrize("content", [WHOLE, save(STATE)], ids=["torch", "safetensors"])
def test_the_bytes_count_and_not_the_name(tmp_path: Path, content: bytes, suffix: str) -> None:
    (tmp_path / f"m{suffix}").write_bytes(content)
    assert torch.equal(read_foreign(tmp_path / f"m{suffix}").views["raw"]["tok_emb.weight"], STATE["tok_emb.weight"])


def test_the_old_format_of_torch_is_read(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "m.pt", _use_new_zipfile_serialization=False)
    assert file_kind((tmp_path / "m.pt").read_bytes()).name == "torch"
    assert torch.equal(read_foreign(tmp_path / "m.pt").views["raw"]["tok_emb.weight"], STATE["tok_emb.weight"])


def test_a_cut_safetensors_file_is_to_be_copied_again(tmp_path: Path) -> None:
    (tmp_path / "m.pt").write_bytes(save(STATE)[:-4])
    with pytest.raises(DamagedFileError, match=r"m\.pt is damaged") as caught:
        read_foreign(tmp_path / "m.pt")
    assert "copy or download it again" in str(caught.value.hint)


def test_a_folder_is_called_a_folder(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="is a folder"):
        read_foreign(tmp_path)


CODECS = {
    "gzip stream": gzip.compress(WHOLE),
    r"bzip2 stream \(bz2\)": bz2.compress(WHOLE),
    "lzma stream without xz's frame": lzma.compress(WHOLE, format=lzma.FORMAT_ALONE),
    "lrzip stream": b"LRZI\0\6" + b"\0" * 100,
    "lz4 stream": b"\x04\x22\x4d\x18" + b"\0" * 20,
    "git-LFS pointer": b"version https://git-lfs.github.com/spec/v1\n",
    "HTML page": b"<!DOCTYPE html>",
    "empty": b"",
    "npz file": written("npz"),
    "plain pickle": pickle.dumps({"w": 1}),
}


@pytest.mark.parametrize("words", CODECS)
def test_a_codec_that_does_not_fit_is_named_and_never_called_brotli(tmp_path: Path, words: str) -> None:
    path = tmp_path / "m.ptz"
    path.write_bytes(CODECS[words])
    for read in (read_foreign, read_foreign_artifact):
        with pytest.raises(DamagedFileError, match=words) as caught:
            read(path)
        assert "brotli stream is damaged" not in str(caught.value)
        assert torch_is_silent(caught.value)


def test_bytes_without_any_mark_say_so(tmp_path: Path) -> None:
    raw = lzma.compress(WHOLE, format=lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "preset": 6}])
    (tmp_path / "m.ptz").write_bytes(raw)
    with pytest.raises(DamagedFileError, match=rf"begins {raw[:4].hex(' ')}.* the mark of no codec .*raw LZMA2"):
        read_foreign(tmp_path / "m.ptz")


@pytest.mark.parametrize("pack", [zlib.compress, brotli.compress, lzma.compress, zstandard.compress])
def test_what_is_inside_an_artifact_is_called_what_it_is(tmp_path: Path, pack: object) -> None:
    (tmp_path / "m.ptz").write_bytes(pack(pickle.dumps({"quantized": {}})))  # type: ignore[operator]
    with pytest.raises(DamagedFileError, match=r"inflated, it is a plain pickle, as train_gpt_mlx\.py writes it"):
        read_foreign(tmp_path / "m.ptz")


def test_an_artifact_is_rounded_as_its_script_rounds_it(tmp_path: Path) -> None:
    stored, expected = int8_artifact()
    (tmp_path / "m.ptz").write_bytes(zlib.compress(saved(stored)))
    read = read_foreign(tmp_path / "m.ptz")
    rounded = expected["tok_emb.weight"].bfloat16().float()
    assert not torch.equal(rounded, expected["tok_emb.weight"])
    assert torch.equal(read.views["raw"]["tok_emb.weight"], rounded)
    assert torch.equal(read.views["raw"]["table"], expected["table"])
    assert any("tok_emb.weight to bfloat16" in note for note in read.notes)


def test_tables_of_a_wm_artifact_are_bfloat16_once_loaded(tmp_path: Path) -> None:
    names = ("tok_emb.weight", "bigram.embed.weight", "ve_shared.embed.weight", "blocks.0.mlp.fc.weight")
    symbols, scale = torch.arange(-31, 32, dtype=torch.int8).reshape(7, 9), torch.linspace(0.01, 0.02, 7).half()
    w = {f"{name}{suffix}": part for name in names for suffix, part in ((".q", symbols), (".scale", scale))}
    stored = {
        "w": {**w, "skip": torch.tensor([0.3]).half()},
        "m": {**dict.fromkeys(names, "gptq (int6)"), "skip": "passthrough (float16)"},
    }
    (tmp_path / "m.ptz").write_bytes(brotli.compress(saved(stored)))
    read = read_foreign(tmp_path / "m.ptz").views["raw"]
    product = symbols.float() * scale.float()[:, None]
    assert not torch.equal(product, product.bfloat16().float())
    for name in names[:3]:
        assert torch.equal(read[name], product.bfloat16().float())
    assert torch.equal(read[names[3]], product)


def test_a_type_that_is_none_is_refused(tmp_path: Path) -> None:
    stored, _ = int8_artifact()
    stored["dtypes"]["tok_emb.weight"] = "complex64"
    (tmp_path / "m.ptz").write_bytes(zlib.compress(saved(stored)))
    with pytest.raises(PgolfError, match=r"tok_emb\.weight is to be cast to complex64"):
        read_foreign(tmp_path / "m.ptz")
