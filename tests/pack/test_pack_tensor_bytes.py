"""Every byte of an artifact belongs to a tensor or the container, in proportion to what coding its values costs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from pgolf_post.cli.size import command
from pgolf_post.errors import MismatchError, NotFoundError, OverBudgetError, SettingsError
from pgolf_post.pack import codecs, decode
from pgolf_post.pack.artifact import read_artifact, write_artifact
from pgolf_post.pack.container import PackSettings, pack
from pgolf_post.pack.report import tensor_bytes
from pgolf_post.pack.report.tensor_bytes import CONTAINER, role_table, share_out, tensor_table
from pgolf_post.quantize.gptq.trellis import Trellis
from pgolf_post.quantize.tensor import QuantizedModel, QuantizedTensor, ScaleFactor
from tests.pack.samples import sample_model

pytestmark = pytest.mark.slow


def artifact_of(path: Path, model: QuantizedModel, codec: str = "rans") -> Path:
    write_artifact(path, pack(model, PackSettings(codec=codec)))
    return path


@pytest.mark.parametrize("codec", codecs.CHOICES)
def test_tensors_and_roles_add_up_to_the_artifact(tmp_path: Path, codec: str) -> None:
    model = sample_model()
    path = artifact_of(tmp_path / "a.pgolf", model, codec)
    rows = tensor_table(path)
    assert [row.name for row in rows] == [*sorted([*model.quantized, *model.passthrough]), CONTAINER]
    assert sum(row.stored_bytes for row in rows) == path.stat().st_size
    assert all(row.stored_bytes > 0 for row in rows)
    assert sum(row.num_weights for row in rows) == 7 * 96 + 24 + 16 + 12
    roles = {row.role: row.stored_bytes for row in role_table(rows)}
    assert sum(roles.values()) == path.stat().st_size
    queries = [row.stored_bytes for row in rows if row.name.endswith("attn.q.weight")]
    assert roles["blocks.*.attn.q.weight"] == sum(queries)


def test_an_artifact_without_tensors_is_all_container(tmp_path: Path) -> None:
    path = artifact_of(tmp_path / "a.pgolf", QuantizedModel({}, {}, {}, {}))
    assert [(row.name, row.stored_bytes) for row in tensor_table(path)] == [(CONTAINER, path.stat().st_size)]


def spread_model(trellis: Trellis | None) -> QuantizedModel:
    """Three blocks of one role whose symbols are of different size, rows that repeat and outliers among them."""
    rng = np.random.default_rng(0)
    quantized = {}
    for block, deviation in enumerate((1.0, 3.0, 9.0)):
        symbols = np.rint(rng.normal(0, deviation, (128, 96))).astype(np.int16)
        symbols[5, :9] = 3000
        symbols[40:60] = symbols[39] + (rng.random((20, 96)) < 0.1)
        name = f"blocks.{block}.mlp.fc.weight"
        factor = ScaleFactor("row", rng.uniform(0.01, 0.02, 128).astype(np.float16))
        quantized[name] = QuantizedTensor(name, symbols, (factor,), (128, 96), trellis)
    return QuantizedModel({}, {}, quantized, {})


@pytest.mark.parametrize("trellis", [None, Trellis(8, 64)])
def test_costs_of_a_rans_unit_are_what_the_coder_spent(tmp_path: Path, trellis: Trellis | None) -> None:
    path = artifact_of(tmp_path / "a.pgolf", spread_model(trellis))
    artifact, data = read_artifact(path), path.read_bytes()
    _, *units = decode.read_units(memoryview(data))
    streams = dict(zip(sorted(decode.lay_out(artifact.manifest)[0]), units, strict=True))
    parts = tensor_bytes.parts_of(artifact.manifest["tensors"], artifact.model)
    raw = bytes(decode.inflate(*streams[tensor_bytes.ROW_SHIFTS], 1 << 20))
    parts[tensor_bytes.ROW_SHIFTS] = tensor_bytes.row_shifts(artifact.manifest["tensors"], raw)
    (key,) = (key for key, (codec_id, _) in streams.items() if codec_id >= codecs.RANS_ID)
    costs = tensor_bytes.rans_costs(key, parts, artifact, streams)
    assert sum(costs) / 8 == pytest.approx(len(streams[key][1]), rel=0.002, abs=4 * 4)  # lanes keep a few bytes each
    assert costs[0] < costs[1] < costs[2]
    assert costs[2] - costs[0] == pytest.approx(108 * 96 * np.log2(9), rel=0.05)  # log2 of the ratio


@given(st.integers(0, 10**8), st.lists(st.floats(0, 1e9), min_size=1, max_size=30))
def test_shares_are_integers_next_to_their_proportion(total: int, costs: list[float]) -> None:
    shares = share_out(total, costs)
    assert sum(shares) == total
    if sum(costs) > 1e-6:
        assert all(abs(share - total * cost / sum(costs)) < 1.01 for share, cost in zip(shares, costs, strict=True))


# the command and the picture


def test_size_lists_tensors_when_asked(tmp_path: Path) -> None:
    path = artifact_of(tmp_path / "a.pgolf", sample_model())
    result = CliRunner().invoke(command, [str(path), "--json"])
    assert "Artifact by tensor" not in result.stderr
    assert {row["name"] for row in json.loads(result.stdout)["roles"]} >= {CONTAINER, "blocks.*.gain"}
    assert "Artifact by tensor" in CliRunner().invoke(command, [str(path), "--tensors"]).stderr


@pytest.mark.parametrize(("ending", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_the_picture_shows_every_large_role_and_is_the_same_twice(tmp_path: Path, ending: str, start: bytes) -> None:
    pytest.importorskip("matplotlib", reason="the extra plots is not installed")
    path = artifact_of(tmp_path / "a.pgolf", spread_model(None))
    pictures = []
    for name in ("one", "two"):
        out = tmp_path / name / f"bytes.{ending}"
        result = CliRunner().invoke(command, [str(path), "--budget", "10000", "--plot", str(out)])
        assert isinstance(result.exception, OverBudgetError)  # and drawn all the same
        pictures.append(out.read_bytes())
    assert pictures[0] == pictures[1]
    assert pictures[0].startswith(start)
    if ending == "svg":
        text = pictures[0].decode()
        assert all(part in text for part in ("blocks.*.mlp.fc.weight", "container", "OVER", f"{path.stat().st_size:,}"))


def test_what_cannot_be_drawn_is_said_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = artifact_of(tmp_path / "a.pgolf", sample_model())
    other = tmp_path / "model.ptz"
    other.write_bytes(b"foreign")
    run = CliRunner().invoke
    assert isinstance(run(command, [str(path), "--plot", "bytes.gif"]).exception, SettingsError)
    pytest.importorskip("matplotlib", reason="the extra plots is not installed")
    assert isinstance(run(command, [str(other), "--plot", str(tmp_path / "b.png")]).exception, MismatchError)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    missing = run(command, [str(path), "--plot", str(tmp_path / "b.png")])
    assert isinstance(missing.exception, NotFoundError)
    assert "pgolf-post[plots]" in str(missing.exception)
    assert not (tmp_path / "b.png").exists()
