"""A compressed artifact of a public script becomes ours with every weight the same, or is refused by name."""

from __future__ import annotations

import io
import json
import lzma
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import brotli
import numpy as np
import pytest
import torch
import zstandard
from click.testing import CliRunner
from torch import Tensor

from pgolf_post.cli.repack import command
from pgolf_post.errors import DamagedFileError, MismatchError, NotFoundError, NumericsError, PgolfError
from pgolf_post.importers import artifact_file
from pgolf_post.importers.foreign_file import read_foreign
from pgolf_post.importers.repack import read_foreign_artifact, repack
from pgolf_post.pack.artifact import read_artifact, unpack
from pgolf_post.pack.codecs import CHOICES
from tests.importers.test_import import fixture_state

pytestmark = pytest.mark.slow


def saved(stored: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(stored, buffer)
    return buffer.getvalue()


def shuffled(content: bytes, stride: int = 2) -> bytes:
    return b"BSHF" + bytes([stride]) + b"".join(content[plane::stride] for plane in range(stride))


def int8_artifact() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The baseline's dictionary as its script writes it, and the weights that it multiplies out."""
    _, state = fixture_state("baseline")
    state = {**state, "table": torch.linspace(-1, 1, 40), "wide": torch.randn(3, 2, 5)}
    quantized, scales, passthrough, expected = {}, {}, {}, {}
    for name, tensor in state.items():
        if tensor.ndim > 1 and name.endswith(("weight", "wide")):
            scales[name] = (tensor.flatten(1).abs().amax(1).clamp_min(1e-8) / 127).half()
            scale = scales[name].float().view(-1, *[1] * (tensor.ndim - 1))
        elif name == "table":
            scales[name] = scale = torch.tensor(1 / 127)
        else:
            passthrough[name] = tensor.float() if "scale" in name or "gain" in name else tensor.half()
            expected[name] = passthrough[name].float()
            continue
        quantized[name] = (tensor / scale).round().clamp(-127, 127).to(torch.int8)
        expected[name] = quantized[name].float() * scale
    passthrough["bits"] = torch.tensor([1.5, -2.0], dtype=torch.bfloat16)
    expected["bits"] = passthrough["bits"].float()
    stored = {
        "__quant_format__": "int8_clean_per_row_v1",
        "quantized": quantized,
        "scales": scales,
        "dtypes": {name: "bfloat16" if name == "tok_emb.weight" else "float32" for name in quantized},
        "passthrough": passthrough,
        "passthrough_orig_dtypes": {"bits": "bfloat16"},
        "qmeta": {name: {"scheme": "per_row", "axis": 0} for name in quantized if name != "table"},
    }
    return stored, expected


def rows_of(tensor: Tensor, reach: int) -> tuple[Tensor, Tensor]:
    scale = (tensor.abs().amax(1) / reach).clamp_min(1e-6).half()
    return (tensor / scale.float()[:, None]).round().clamp(-reach - 1, reach).to(torch.int8), scale


def int6_artifact() -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """A {w, m} dictionary; the weights without corrections; and the corrections, A @ B in float64."""
    torch.manual_seed(0)
    w: dict[str, Tensor] = {}
    m: dict[str, str] = {}
    base: dict[str, Tensor] = {}
    names = [f"blocks.{i}.{part}.weight" for i in range(2) for part in ("attn.c_q", "mlp.fc")] + ["tok_emb.weight"]
    for name in names:
        q, s = rows_of(torch.randn(48, 32), 31)
        w |= {f"{name}.q": q, f"{name}.scale": s}
        base[name], m[name] = q.float() * s.float()[:, None], "gptq (int6)"
    gate = "blocks.0.attn.attn_gate_w"
    q, s = rows_of(torch.randn(4, 12), 127)
    w |= {f"{gate}.gq": q, f"{gate}.gs": s}
    base[gate], m[gate] = q.float() * s.float()[:, None], "gate_int8_row"
    w["blocks.0.attn.q_gain"] = torch.randn(4).half()
    base["blocks.0.attn.q_gain"], m["blocks.0.attn.q_gain"] = w["blocks.0.attn.q_gain"].float(), "passthrough (float16)"
    corrections = {}
    (one, two), rank = names[:2], 4
    a, b = torch.randint(-2, 2, (48, rank), dtype=torch.int8), torch.randint(-8, 8, (rank, 32), dtype=torch.int8)
    a_scale, b_scale = torch.tensor(0.01).half(), (torch.rand(2) / 9).half()  # 128 values of B: two groups of 64
    w |= {f"{one}.lqA_a": a, f"{one}.lqAs_a": a_scale, f"{one}.lqB_a": b, f"{one}.lqBs_a": b_scale}
    spread = b_scale.double().repeat_interleave(64).view(rank, 32)
    corrections[one], m[one] = (a.double() * a_scale.double()) @ (b.double() * spread), "gptq (int6)+lqer_asym"
    rows, by_rank = (torch.rand(48) / 9).half(), (torch.rand(rank) / 9).half()
    w |= {f"{two}.lqA": a, f"{two}.lqAs": rows, f"{two}.lqB": b, f"{two}.lqBs": by_rank}
    corrections[two] = (a.double() * rows.double()[:, None]) @ (b.double() * by_rank.double()[:, None])
    m[two] = "gptq (int6)+lqer"
    return {"w": w, "m": m}, base, corrections


def assert_same(found: dict[str, np.ndarray], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].tobytes() == tensor.contiguous().numpy().tobytes(), name


@pytest.mark.parametrize("codec", ["rans", "brotli", "best"])
def test_the_baselines_artifact_keeps_every_weight(tmp_path: Path, codec: str) -> None:
    stored, expected = int8_artifact()
    path = tmp_path / "final_model.int8.ptz"
    path.write_bytes(zlib.compress(saved(stored), 9))
    foreign = read_foreign_artifact(path)
    decoded = unpack(repack(foreign, codec))
    assert_same(dict(decoded.tensors), expected)
    assert decoded.manifest["lineage"]["casts"] == {"bfloat16": ["bits", "tok_emb.weight"]}
    loaded = {**expected, "tok_emb.weight": expected["tok_emb.weight"].bfloat16().float()}  # as the script loads it
    assert_same({name: tensor.numpy() for name, tensor in read_foreign(path).views["raw"].items()}, loaded)


COMPRESS = {
    "brotli": lambda content: brotli.compress(content, quality=5),
    "lzma": lzma.compress,
    "zlib": zlib.compress,
    "zstd": zstandard.compress,
    "stored": bytes,
}


@pytest.mark.parametrize(
    ("codec", "stride"),
    [("stored", 0), ("zlib", 0), ("zstd", 0), ("lzma", 2), ("brotli", 0), ("brotli", 2), ("brotli", 3)],
)
def test_weights_and_meta_keep_every_symbol_and_scale(tmp_path: Path, codec: str, stride: int) -> None:
    stored, base, corrections = int6_artifact()
    content = saved(stored)
    path = tmp_path / "final_model.int6.ptz"
    path.write_bytes(COMPRESS[codec](shuffled(content, stride) if stride else content))
    decoded = unpack(repack(read_foreign_artifact(path)))
    own = {name: tensor.dequantize() for name, tensor in decoded.model.quantized.items() if ".lq" not in name}
    kept = {name: decoded.tensors[name] for name in decoded.model.passthrough}
    assert_same({**own, **kept}, base)
    for name, product in corrections.items():
        left, right = (decoded.model.quantized[name + suffix].dequantize() for suffix in (".lqA", ".lqB"))
        np.testing.assert_allclose(left.astype(np.float64) @ right.astype(np.float64), product.numpy(), rtol=1e-6)
        expected = base[name] + torch.from_numpy(left) @ torch.from_numpy(right)
        np.testing.assert_allclose(decoded.tensors[name], expected.numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("group", [16, 32, 64, 96, 128, 384])
def test_the_corrections_groups_may_have_any_size(tmp_path: Path, group: int) -> None:
    torch.manual_seed(1)
    q, scale = rows_of(torch.randn(48, 96), 31)
    a, b = torch.randint(-2, 2, (48, 4), dtype=torch.int8), torch.randint(-8, 8, (4, 96), dtype=torch.int8)
    b_scale = (torch.rand(b.numel() // group) / 9).half()
    parts = {
        ".q": q,
        ".scale": scale,
        ".lqA_a": a,
        ".lqAs_a": torch.tensor(0.01).half(),
        ".lqB_a": b,
        ".lqBs_a": b_scale,
    }
    stored = {"w": {f"x{suffix}": part for suffix, part in parts.items()}, "m": {"x": "gptq (int6)+lqer_asym"}}
    path = tmp_path / "m.ptz"
    path.write_bytes(brotli.compress(saved(stored), quality=1))
    found = unpack(repack(read_foreign_artifact(path))).tensors["x"]
    spread = (b.double().view(-1, group) * b_scale.double()[:, None]).view(4, 96)
    expected = q.double() * scale.double()[:, None] + a.double() * float(torch.tensor(0.01).half()) @ spread
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-6)


def test_a_shuffle_with_two_bytes_of_stride_is_read(tmp_path: Path) -> None:
    content, path = saved(int6_artifact()[0]), tmp_path / "m.ptz"
    one = shuffled(content)
    path.write_bytes(brotli.compress(one[:5] + b"\0" + one[5:], quality=1))
    assert artifact_file.unshuffle(one[:5] + b"\0" + one[5:], path) == content
    assert read_foreign_artifact(path).format == "w+m"


# refused


def w_and_m(w: dict[str, Any], m: Any) -> dict[str, Any]:
    return {"w": w, "m": m}


Q, S = torch.ones(3, 2, dtype=torch.int8), torch.ones(3).half()
TEXT = "gptq (int6)"
INT8 = int8_artifact()[0]
REFUSED: list[tuple[Any, type[PgolfError], str]] = [
    ({"weights": Q}, MismatchError, "unknown kind of artifact; its keys: weights"),
    ([Q], MismatchError, "holds a list"),
    (w_and_m({"a.q": Q}, {"a": TEXT}), MismatchError, r"a is said to be 'gptq \(int6\)', but there is a\.q"),
    (w_and_m({"a.q": Q, "a.scale": S, "b": S}, {"a": TEXT}), MismatchError, "does not explain: b"),
    (w_and_m({"a.q": Q, "a.scale": S}, {"a": TEXT + "+lqer_asym"}), MismatchError, "a is said to be"),
    (w_and_m({"a.q": Q, "a.scale": S[:2]}, {"a": TEXT}), MismatchError, r"2 scales for \(3, 2\) symbols"),
    (w_and_m({"a.q": Q.float(), "a.scale": S}, {"a": TEXT}), MismatchError, "is torch.float32, expected int8"),
    (w_and_m({"a": Q.long()}, {"a": "passthrough"}), MismatchError, "is torch.int64, expected float16"),
    (w_and_m({"a": 3}, {"a": "passthrough"}), MismatchError, r"w\['a'\] is a int, expected a plain tensor"),
    (w_and_m({"a": Q.to_sparse()}, {"a": "passthrough"}), MismatchError, "expected a plain tensor"),
    (w_and_m({"a": S}, 7), MismatchError, "'m' is a int"),
    (w_and_m({"a": S * np.nan}, {"a": "passthrough"}), NumericsError, "NaN or infinity in floats: a"),
    (
        w_and_m({"a.q": Q, "a.scale": S / 0}, {"a": TEXT}),
        NumericsError,
        r"m.ptz: a's scale\[0\] is inf \(3 such values",
    ),
    ({**INT8, "__quant_format__": "v2"}, MismatchError, "'v2', expected 'int8_clean_per_row_v1'"),
    ({**INT8, "scales": {}}, MismatchError, "has symbols or scales alone"),
    ({**INT8, "extra": {}}, MismatchError, "unknown extra"),
    ({**INT8, "dtypes": 5}, MismatchError, "types in a int"),
    ({"__quant_format__": "int8_clean_per_row_v1"}, MismatchError, "missing dtypes; missing passthrough"),
    (w_and_m({"a": torch.zeros(1).expand(1 << 20, 1 << 20)}, {"a": "passthrough"}), DamagedFileError, "declares 4,398"),
]


@pytest.mark.parametrize(("stored", "error", "message"), REFUSED)
def test_what_does_not_fit_together_is_refused(
    tmp_path: Path, stored: Any, error: type[PgolfError], message: str
) -> None:
    path = tmp_path / "m.ptz"
    path.write_bytes(brotli.compress(saved(stored), quality=1))
    with pytest.raises(error, match=message):
        repack(read_foreign_artifact(path))


@pytest.mark.parametrize("codec", ["brotli", "lzma", "zlib", "zstd"])
def test_a_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str) -> None:
    monkeypatch.setattr(artifact_file, "MAX_INFLATED_BYTES", 1 << 20)
    path = tmp_path / "bomb.ptz"
    path.write_bytes(COMPRESS[codec](bytes(1 << 24)))
    with pytest.raises(DamagedFileError, match=r"bomb\.ptz: .* larger than 1,048,576|stream is damaged"):
        read_foreign_artifact(path)


def test_a_zip_that_would_grow_again_is_refused(tmp_path: Path) -> None:
    path, again = tmp_path / "m.ptz", io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(saved(int6_artifact()[0]))) as old,
        zipfile.ZipFile(again, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for entry in old.namelist():
            new.writestr(entry, old.read(entry))
    path.write_bytes(zlib.compress(again.getvalue()))
    with pytest.raises(DamagedFileError, match="compressed once more"):
        read_foreign_artifact(path)


def test_a_per_group_artifact_is_named_and_refused(tmp_path: Path) -> None:
    (tmp_path / "m.ptz").write_bytes(b"PGRP" + struct.pack("<II", 1, 4) + b"LRZI")
    with pytest.raises(MismatchError, match="per-group artifact"):
        read_foreign_artifact(tmp_path / "m.ptz")
    with pytest.raises(NotFoundError, match="no such artifact file"):
        read_foreign_artifact(tmp_path / "absent.ptz")


@pytest.mark.parametrize("inside", [False, True], ids=["stream", "dictionary"])
def test_damage_ends_in_a_named_error_or_changes_weights(tmp_path: Path, inside: bool) -> None:
    """What is inside has no checksum: damage may change weights there, but ends in no other error than ours."""
    content = saved(int6_artifact()[0])
    original = content if inside else zlib.compress(content)
    path, rng, refused = tmp_path / "m.ptz", np.random.default_rng(0), 0
    for _ in range(150):
        at, length = int(rng.integers(len(original))), int(rng.integers(1, 9))
        broken = original[:at] + rng.bytes(length) + original[at + length * int(rng.integers(2)) :]
        broken = broken[: int(rng.integers(len(broken)))] if rng.integers(8) == 0 else broken
        path.write_bytes(zlib.compress(broken, 1) if inside else broken)
        try:
            with np.errstate(all="ignore"):
                read_foreign_artifact(path).model.tensors()
        except PgolfError:
            refused += 1
    assert refused > (20 if inside else 140)


# the command


def test_repack_prints_bytes_before_and_after_and_writes_when_asked(tmp_path: Path) -> None:
    stored, base, _ = int6_artifact()
    path, out = tmp_path / "final_model.int6.ptz", tmp_path / "new" / "artifact.pgolf"
    path.write_bytes(brotli.compress(shuffled(saved(stored))))
    result = CliRunner().invoke(command, [str(path), "--json"])
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert answer["before_bytes"] == path.stat().st_size
    assert answer["saved_bytes"] == answer["before_bytes"] - answer["artifact_bytes"] > 0
    assert (answer["format"], answer["out"]) == ("w+m", None)
    assert not out.parent.exists()
    result = CliRunner().invoke(command, [str(path), "--out", str(out), "--codec", "brotli"])
    assert result.exit_code == 0, result.output
    assert read_artifact(out).manifest["symbols_sha256"] == answer["symbols_sha256"]
    assert set(read_artifact(out).tensors) == set(base)
    refused = CliRunner().invoke(command, [str(path), "--codec", "arj"])
    assert refused.exit_code == 2
    assert all(name in refused.output for name in CHOICES)
