"""Laws of the artifact: decoding undoes packing, the same model gives the same bytes, and a failed write costs nothing.

Golden artifacts of every kind of rANS that format 2 has had must decode for as long as it keeps its version.
"""

from __future__ import annotations

import base64
import errno
import hashlib
from pathlib import Path
from typing import Any

import brotli
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pgolf_post.errors import DamagedFileError, MismatchError, NotFoundError, NumericsError, PgolfError, SettingsError
from pgolf_post.pack import artifact, codecs, container, decode
from pgolf_post.pack.artifact import DecodedArtifact, unpack
from pgolf_post.pack.container import PackSettings, pack
from pgolf_post.quantize.gptq.trellis import POLYNOMIALS, Trellis
from pgolf_post.quantize.tensor import QuantizedModel, QuantizedTensor, ScaleFactor, symbols_sha256
from pgolf_post.settings import parse_settings
from tests.pack import goldens

pytestmark = pytest.mark.slow

GOLDEN_BROTLI = ("1.1", "1.2")  # releases whose encoder gives the golden bytes

NAMES = [
    "tok_emb.weight",
    "lm_head.weight",
    *(f"blocks.{block}.{part}.weight" for block in range(4) for part in ("attn.q", "attn.k", "mlp.proj")),
    *(f"blocks.{block}.attn.gain" for block in (0, 1, 2, 10, 999_999)),
    "blocks.007.odd",
    "blocks.1234567.far",
    "a.1.b.2.c",
    "a.1.b.3.c",
    "3.start",
    "end.3",
    "",
]


def tensor(name: str, symbols: Any, scales: Any, dtype: type = np.int8) -> QuantizedTensor:
    """Row-scaled symbols, the plainest kind of quantized tensor."""
    array = np.asarray(symbols, dtype)
    return QuantizedTensor(name, array, (ScaleFactor("row", np.asarray(scales, np.float16)),), array.shape)


def model_of(*tensors: QuantizedTensor, **passthrough: np.ndarray) -> QuantizedModel:
    return QuantizedModel({"family": "golf_gpt"}, {"view": "raw"}, {t.name: t for t in tensors}, passthrough)


def tiny_model() -> QuantizedModel:
    """Three blocks, both symbol types, all factors, a trellis, a low-rank pair, both kinds of passthrough."""
    queries = [tensor(f"blocks.{i}.attn.q.weight", [[i, -1], [3, 7 - i]], [0.5, 0.25 * (i + 1)]) for i in range(2)]
    last = tensor("blocks.2.attn.q.weight", [[127, -1270]], [1.0], np.int16)
    factors = (
        ScaleFactor("tensor", np.array([-3], np.int8)),
        ScaleFactor("row", np.array([0, 1, -2, 3], np.int8)),
        ScaleFactor("column", np.array([500, -9, 2], np.int16)),
        ScaleFactor("group", np.array([0.5, 2, 1], np.float16), 5),
    )
    symbols = np.arange(-6, 6, dtype=np.int8).reshape(4, 3)
    embedding = QuantizedTensor("tok_emb.weight", symbols, factors, (4, 3), Trellis(8, 3))
    pair = tensor("tok_emb.weight.lqA", np.ones((4, 1)), [1] * 4), tensor("tok_emb.weight.lqB", [[1, 2, 3]], [1])
    gains = {"blocks.0.gain": np.array([1.5, -0.0], np.float16), "scale": np.array(0x3F80, np.uint16)}
    return model_of(*queries, last, embedding, *pair, **gains)


@st.composite
def finite_halves(draw: st.DrawFn, shape: tuple[int, ...]) -> np.ndarray:
    bits = draw(hnp.arrays(np.uint16, shape))
    halves = bits.view(np.float16) if bits.ndim else np.float16(np.uint16(bits).view(np.float16))
    return np.where(np.isfinite(halves), halves, np.float16(-0.0)).astype(np.float16)


@st.composite
def factors(draw: st.DrawFn, rows: int, columns: int) -> ScaleFactor:
    axis = draw(st.sampled_from(["tensor", "row", "column", "group"]))
    size = draw(st.integers(1, 7)) if axis == "group" else 0
    length = {"tensor": 1, "row": rows, "column": columns}.get(axis, -(-rows * columns // max(1, size)))
    kind = draw(st.sampled_from([np.float16, np.float32, np.int8, np.int16]))
    if kind in (np.float16, np.float32):
        return ScaleFactor(axis, draw(finite_halves((length,))).astype(kind), size)
    return ScaleFactor(axis, draw(hnp.arrays(kind, (length,), elements=st.integers(-100, 100))), size)


@st.composite
def quantized_tensors(draw: st.DrawFn, name: str) -> QuantizedTensor:
    rows, columns = draw(st.integers(0, 5)), draw(st.integers(0, 5))
    dtype = draw(st.sampled_from([np.int8, np.int16]))
    limit = draw(st.sampled_from([0, 1, 3, 120, np.iinfo(dtype).max]))
    symbols = draw(hnp.arrays(dtype, (rows, columns), elements=st.integers(-limit, limit)))
    layout = draw(st.sampled_from(["plain", "transposed", "strided"]))
    if layout == "transposed":
        symbols = np.asfortranarray(symbols)
    elif layout == "strided":
        symbols = np.repeat(symbols, 2, axis=1)[:, ::2]
    trellises = st.builds(Trellis, st.sampled_from(list(POLYNOMIALS)), st.integers(1, 4))
    made = draw(st.lists(factors(rows, columns), max_size=3))
    shape = draw(st.sampled_from([(rows, columns), (rows, columns, 1)] + ([(columns,)] if rows == 1 else [])))
    return QuantizedTensor(name, symbols, tuple(made), shape, draw(st.none() | trellises))


@st.composite
def models(draw: st.DrawFn) -> QuantizedModel:
    names = draw(st.lists(st.sampled_from(NAMES), unique=True, max_size=8))
    split = draw(st.integers(0, len(names)))
    quantized = {name: draw(quantized_tensors(name)) for name in names[:split]}
    shapes = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3)
    passthrough = {name: draw(finite_halves(draw(shapes))) for name in names[split:]}
    if draw(st.booleans()):
        passthrough["single"] = draw(
            hnp.arrays(np.float32, draw(shapes), elements=st.floats(-(2.0**99), 2.0**99, width=32))
        )
        passthrough["wide"] = draw(hnp.arrays(np.uint16, draw(shapes), elements=st.integers(0, 0x7F7F)))
    lineage = draw(st.dictionaries(st.text(max_size=4), st.integers() | st.text(max_size=4), max_size=3))
    return QuantizedModel({"family": "golf_gpt"}, lineage, quantized, passthrough)


def assert_same(artifact: DecodedArtifact, model: QuantizedModel) -> None:
    """Every array bit for bit, with its dtype, every shape and trellis, and the float32 weights."""
    assert artifact.manifest["symbols_sha256"] == model.symbols_sha256() == artifact.model.symbols_sha256()
    assert (artifact.manifest["config"], artifact.manifest["lineage"]) == (model.config, model.lineage)
    assert_arrays_equal(artifact.symbols, {name: t.symbols for name, t in model.quantized.items()})
    for name, expected in model.quantized.items():
        found = artifact.model.quantized[name]
        assert (found.shape, found.trellis, len(found.factors)) == (
            expected.shape,
            expected.trellis,
            len(expected.factors),
        )
        for one, other in zip(found.factors, expected.factors, strict=True):
            assert (one.axis, one.group_size) == (other.axis, other.group_size)
            assert_arrays_equal({name: one.values}, {name: other.values})
    assert_arrays_equal(artifact.model.passthrough, dict(model.passthrough))
    with np.errstate(all="ignore"):
        assert_arrays_equal(dict(artifact.tensors), model.tensors())


def assert_arrays_equal(found: Any, expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert isinstance(found[name], np.ndarray), name  # not a number, which a tensor cannot be made of
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert found[name].tobytes() == np.ascontiguousarray(array).tobytes(), name


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # arbitrary factors overflow float32
@given(model=models(), codec=st.sampled_from(codecs.CHOICES))
@settings(max_examples=40, deadline=None)
def test_decode_undoes_pack(model: QuantizedModel, codec: str) -> None:
    assert_same(unpack(pack(model, PackSettings(codec=codec))), model)


ROWS = np.random.default_rng(0).integers(-9, 10, (40, 30)).astype(np.int8)
REPEATED = (ROWS[:1] + np.random.default_rng(1).integers(0, 2, (40, 30))).astype(np.int8)


@pytest.mark.parametrize("codec", ["rans", "best"])
@pytest.mark.parametrize(
    "model",
    [
        model_of(),
        model_of(tensor("w", [[5]], [1])),
        model_of(tensor("w", np.zeros((0, 7)), [])),
        model_of(tensor("w", np.zeros((7, 0)), [1] * 7)),
        model_of(tensor("w", np.full((64, 64), 3), [1] * 64)),
        model_of(tensor("w", np.tile([127, -127], (9, 30)), [65504] * 9)),
        model_of(tensor("w", np.tile([-128, 5], (9, 30)), [1] * 9)),
        model_of(tensor("w", np.tile([32767, -32768, 0, 1], (9, 30)), [1] * 9, np.int16)),
        model_of(tensor("w", np.arange(64).reshape(8, 8).T, [6e-8] * 8)),
        model_of(tensor("w", REPEATED, [1] * 40)),
        model_of(tensor("w", np.where(np.arange(40)[:, None] % 2, 127 - REPEATED, -REPEATED), [1] * 40)),
        tiny_model(),
    ],
    ids=[
        *("empty", "1x1", "0 rows", "0 columns", "constant", "outliers", "least", "wide", "transposed", "repeated"),
        *("alternating", "tiny"),
    ],
)
def test_edge_models_survive(model: QuantizedModel, codec: str) -> None:
    assert_same(unpack(pack(model, PackSettings(codec=codec))), model)


def test_same_model_gives_same_bytes_whatever_the_order_of_its_tensors() -> None:
    model = tiny_model()
    backwards = QuantizedModel(
        dict(reversed(model.config.items())),
        model.lineage,
        dict(reversed(model.quantized.items())),
        dict(reversed(model.passthrough.items())),
    )
    assert pack(model) == pack(model) == pack(backwards)


def repeating_model() -> QuantizedModel:
    """Two rows of three nearly repeat each other, under a trellis."""
    row, column = np.indices((64, 24))
    noise = row * row * 31 + column * column * 17 + row * column * 7
    alike = 5 * (column * column % 7) - 15 + (noise % 11 % 4 - 1) // 2
    symbols = np.where(row % 3 > 0, alike, noise % 61 - 30).astype(np.int8)
    factors = (ScaleFactor("row", np.full(64, 0.5, np.float16)),)
    return bare_model(QuantizedTensor("tok_emb.weight", symbols, factors, (64, 24), Trellis(8, 40)))


def bare_model(*tensors: QuantizedTensor) -> QuantizedModel:
    return QuantizedModel({}, {}, {tensor.name: tensor for tensor in tensors}, {})


@pytest.mark.parametrize(
    ("kind", "stored", "model"),
    [
        (4, goldens.QUICK, tiny_model()),
        (5, goldens.STEADY, repeating_model()),
        (7, goldens.INFORMED, tiny_model()),
    ],
)
def test_golden_artifacts_still_decode(kind: int, stored: str, model: QuantizedModel) -> None:
    golden = base64.b64decode(stored)
    assert hashlib.sha256(golden).hexdigest() == goldens.SHA256[kind]
    assert kind in [codec for codec, _ in decode.read_units(memoryview(golden))]
    assert_same(unpack(golden), model)


@pytest.mark.skipif(not brotli.__version__.startswith(GOLDEN_BROTLI), reason="another brotli may compress differently")
def test_golden_bytes() -> None:
    assert hashlib.sha256(pack(tiny_model())).hexdigest() == goldens.SHA256[7]


def test_floats_are_stored_as_planes_or_as_they_lie_whichever_is_smaller() -> None:
    floats = np.random.default_rng(0).normal(1, 0.1, 5000).astype(np.float16)
    model = model_of(gain=floats)
    units = container.pack_units(model)
    codec, stream = units[1]
    assert codec == codecs.WORDS_ID
    assert len(stream) < len(codecs.compress(container.to_planes([floats], container.FLOAT16), codecs.BEST)[1])
    assert_same(unpack(container.frame_units(units)), model)


def test_inputs_are_untouched() -> None:
    model = tiny_model()
    before = {name: t.symbols.copy() for name, t in model.quantized.items()}
    pack(model)
    assert symbols_sha256(before) == model.symbols_sha256()


def test_best_is_the_smallest_of_every_codec_per_unit(tmp_path: Path) -> None:
    sizes = {}
    for codec in [*codecs.CODECS, codecs.BEST]:  # rANS never pays in so small a model
        artifact.write_artifact(tmp_path / codec, pack(tiny_model(), PackSettings(codec=codec)))
        sizes[codec] = [unit.stored_bytes for unit in artifact.read_facts(tmp_path / codec).units]
    best = sizes.pop(codecs.BEST)
    assert best[1:] == [min(column) for column in zip(*sizes.values(), strict=True)][1:]


def test_every_codec_has_its_own_id_and_a_branch_in_the_decoder() -> None:
    raw = bytes(range(256)) * 3
    assert len({codec.id for codec in codecs.CODECS.values()} | {codecs.RANS_ID}) == len(codecs.CODECS) + 1
    for name, codec in codecs.CODECS.items():
        assert bytes(decode.inflate(codec.id, memoryview(codec.compress(raw)), len(raw))) == raw
        assert codecs.codec_name(codec.id) == name
    assert codecs.codec_name(codecs.RANS_ID) == "rans"


def test_unknown_codec_names_the_valid_ones() -> None:
    with pytest.raises(SettingsError, match="unknown codec 'zip'; valid codecs: none, brotli, lzma, zlib, rans, best"):
        parse_settings(PackSettings, {"codec": "zip"}, "flags")
    with pytest.raises(SettingsError, match="unknown codec id 9"):
        codecs.codec_name(9)
    with pytest.raises(SettingsError, match="'rans' does not take plain bytes"):
        codecs.compress(b"", "rans")


def test_brotli_is_within_one_percent_of_the_entropy_of_gaussian_symbols() -> None:
    symbols = np.rint(np.random.default_rng(0).normal(0, 3, (256, 1024))).astype(np.int8)
    counts = np.unique(symbols, return_counts=True)[1] / symbols.size
    entropy_bytes = -float((counts * np.log2(counts)).sum()) * symbols.size / 8
    assert len(codecs.CODECS["brotli"].compress(symbols.tobytes())) < 1.01 * entropy_bytes


@pytest.mark.parametrize(
    ("name", "role", "index"),
    [
        ("blocks.3.attn.q.weight", "blocks.*.attn.q.weight", 3),
        ("tok_emb.weight", "tok_emb.weight", None),
        ("a.1.b.2.c", "a.*.b.2.c", 1),
        ("blocks.007.odd", "blocks.007.odd", None),
        ("blocks.1234567.far", "blocks.1234567.far", None),
    ],
)
def test_role_is_the_name_without_its_block_index(name: str, role: str, index: int | None) -> None:
    assert container.split_role(name) == (role, index)


def test_units_report_the_whole_file(tmp_path: Path) -> None:
    data = pack(tiny_model(), PackSettings(codec="brotli"))
    artifact.write_artifact(tmp_path / "a.pgolf", data)
    facts = artifact.read_facts(tmp_path / "a.pgolf")
    assert sum(unit.stored_bytes for unit in facts.units) + 0 == len(data)
    assert {unit.label: unit.num_values for unit in facts.units} == {
        "": 0,
        "tensor factors, int8": 1,
        "row factors, int8": 4,
        "row factors, float16": 10,
        "column factors, int16": 3,
        "group factors, float16": 3,
        "passthrough, float16": 2,
        "passthrough, bfloat16": 1,
        "blocks.*.attn.q.weight": 2,
        "tok_emb.weight": 12,
        "tok_emb.weight.lqA": 4,
        "tok_emb.weight.lqB": 3,
    }
    assert [u.num_values for u in facts.units if u.label == "blocks.*.attn.q.weight"] == [8, 2]  # int8, int16


@pytest.mark.parametrize("codec", codecs.CHOICES)
def test_every_unit_is_announced(codec: str) -> None:
    calls: list[int] = []
    pack(tiny_model(), PackSettings(codec=codec), on_unit=lambda: calls.append(1))
    assert len(calls) == container.count_units(tiny_model()) == 13


HALF = np.ones(1, np.float16)
ONE = np.zeros((1, 1), np.int8)
ROW = (ScaleFactor("row", HALF),)


def odd(symbols: Any = ONE, factors: Any = ROW, shape: Any = (1, 1), trellis: Trellis | None = None) -> QuantizedModel:
    """A model whose one tensor is out of order in one respect."""
    return model_of(QuantizedTensor("w", symbols, factors, shape, trellis))


REFUSED = [
    (
        odd(factors=(ScaleFactor("row", np.ones(2, np.float16)),)),
        r"w: row factor is float16 \(2,\), expected .* \(1,\)",
    ),
    (odd(factors=(ScaleFactor("row", np.ones(1)),)), "w: row factor is float64"),
    (odd(factors=(ScaleFactor("column", np.ones(1, np.int32)),)), "w: column factor is int32"),
    (odd(factors=(ScaleFactor("group", HALF, 0),)), "w: groups of 0 weights"),
    (odd(symbols=np.zeros(1, np.int8)), r"w: symbols are int8 \(1,\), expected int8 or int16 \(rows, columns\)"),
    (odd(symbols=np.zeros((1, 1))), "w: symbols are float64"),
    (odd(shape=(2, 1)), r"w: symbols \(1, 1\) do not make a tensor of \(2, 1\)"),
    (odd(trellis=Trellis(7, 4)), r"w: Trellis\(states=7, lane_rows=4\), expected one of 4, 8"),
    (odd(trellis=Trellis(8, -1)), "lanes of rows, or 0 for diagonals"),
    (model_of(g=np.ones(1)), "g: passthrough dtype float64, expected float16, float32, or uint16 for bfloat16"),
    (model_of(tensor("w", [[1]], [1]), w=HALF), "w: both quantized and passed through"),
    (model_of(**{"a.*.b": HALF}), r"'a.\*.b': a tensor name must be ASCII"),
    (model_of(größe=HALF), "a tensor name must be ASCII"),
    (model_of(tensor("w.lqA", [[1]], [1])), "w.lqA: needs matrices w.lqB and w"),
    (model_of(tensor("w.lqB", [[1]], [1])), "w.lqB: its other half w.lqA is missing"),
    (
        model_of(tensor("w", [[1]], [1]), tensor("w.lqA", [[1], [1]], [1, 1]), tensor("w.lqB", [[1]], [1])),
        r"w: \(2, 1\) @ \(1, 1\) does not make \(1, 1\)",
    ),
    (QuantizedModel({}, {}, {"x": tensor("w", [[1]], [1])}, {}), "x: holds a tensor named w"),
    (QuantizedModel({}, {"path": Path("a")}, {}, {}), "config and lineage must be plain JSON"),
    (QuantizedModel({}, {"loss": float("nan")}, {}, {}), "config and lineage must be plain JSON"),
    (model_of(g=np.zeros((0, 1 << 28), np.float16)), "longer than 133,169,152 in one dimension"),
]


@pytest.mark.parametrize(("model", "message"), REFUSED)
def test_what_the_format_cannot_hold_is_refused(model: QuantizedModel, message: str) -> None:
    with pytest.raises(MismatchError, match=message):
        pack(model)


def test_every_offender_is_listed() -> None:
    broken = [QuantizedTensor(name, ONE, (), (3,)) for name in ("first", "second")]
    with pytest.raises(MismatchError, match=r"first: .*second: "):
        pack(model_of(*broken))


def test_nan_and_infinity_are_refused() -> None:
    wide = np.array([0x7F80, 0x3F80], np.uint16)  # infinity as bfloat16
    with pytest.raises(NumericsError, match="w row factor, g, h"):
        pack(model_of(tensor("w", [[1]], [np.inf]), g=np.array([np.nan], np.float16), h=wide))


def test_a_model_over_the_decoders_limit_is_refused() -> None:
    huge = np.lib.stride_tricks.as_strided(np.zeros(1, np.int8), (1 << 14, 1 << 13), (0, 0))
    with pytest.raises(PgolfError, match="bytes before compression; the limit is 133,169,152"):
        pack(model_of(QuantizedTensor("w", huge, (), huge.shape)))


def test_a_manifest_over_the_limit_is_refused() -> None:
    with pytest.raises(PgolfError, match=r"the manifest has .* bytes; the limit is 1,048,576"):
        pack(QuantizedModel({"note": "x" * (1 << 20)}, {}, {}, {}))


def test_reading_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.pgolf"
    with pytest.raises(NotFoundError, match=r"a\.pgolf"):
        artifact.read_artifact(path)
    path.write_bytes(pack(tiny_model())[:-1])
    for read in (artifact.read_artifact, artifact.read_facts):
        with pytest.raises(DamagedFileError, match=r"a\.pgolf: damaged artifact: "):
            read(path)


def test_a_failed_write_leaves_the_old_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "artifact.pgolf"
    artifact.write_artifact(path, b"old")

    def full_disk(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[:2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(PgolfError, match="No space left on device"):
        artifact.write_artifact(path, b"new bytes")
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["artifact.pgolf"]
