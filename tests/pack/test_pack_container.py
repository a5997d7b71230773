"""Laws of the artifact: decoding undoes packing, the same model gives the same bytes, and a failed write costs nothing.

The golden artifact below is format v1 as first written: it must decode for as long as the format keeps its version.
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
from pgolf_post.pack import codecs, container, decode
from pgolf_post.pack.container import PackSettings, pack
from pgolf_post.quantize.tensor import QuantizedModel, QuantizedTensor, symbols_sha256
from pgolf_post.settings import parse_settings

GOLDEN_SHA256 = "5bc8af4d746c881fba042c7245781e868cd45a1b49eb0798a5bc650e36301f86"
GOLDEN_BROTLI = ("1.1", "1.2")  # releases whose encoder gives the golden bytes
GOLDEN = """
UEdMRgEFAAHFAAAAGgEAAIpiHEkfGQEAnAd2LLB0Bgd6hYg1SpGtPd9vTuUj2277ycG7Kc0FwNRh6WuWLpuyZjvlOW670Wi7ZI9d
lkYRRpZaotktB8WscLjP/m3EB5mgIC50++XDQgNHmKc10pEVU7gnhZ0tOEkvWqDPd+/+wN9UwHiBVPzVcLjSpHwNl6W7j3cmiiuh
PZUkmAspcKGlr39pG0kxa65m2P0885uLUIwlcDyBMAYYSlhlTlkjURoqrWwcJXGmIYjZOo4ZcQzt2GU6CyWJUhtKGgEOAAAACgAA
AJyZNlOPBIAA/wMHAf8DBn+BAwEQAAAADAAAADu8bsmPBYD6+/z9/v8AAQIDBAUDARYAAAASAAAAB4oOy48IgAAAAAAAAAAAADg0
ODg8PEBCRAMBCAAAAAQAAAC/F/+AjwGAAAA+gAM=
"""

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


def tensor(name: str, symbols: Any, scales: Any, bits: int) -> QuantizedTensor:
    return QuantizedTensor(name, np.asarray(symbols, np.int8), np.asarray(scales, np.float16), bits)


def model_of(*tensors: QuantizedTensor, **passthrough: np.ndarray) -> QuantizedModel:
    return QuantizedModel({"family": "golf_gpt"}, {"view": "raw"}, {t.name: t for t in tensors}, passthrough)


def tiny_model() -> QuantizedModel:
    """Two roles, three blocks, one odd bit width, one control tensor: all of the table's cases in a few bytes."""
    queries = [tensor(f"blocks.{i}.attn.q.weight", [[i, -1], [3, 7 - i]], [0.5, 0.25 * (i + 1)], 4) for i in range(2)]
    last = tensor("blocks.2.attn.q.weight", [[127, -127]], [1.0], 8)
    embedding = tensor("tok_emb.weight", np.arange(-6, 6).reshape(4, 3), [1, 2, 3, 4], 6)
    return model_of(*queries, last, embedding, **{"blocks.0.gain": np.array([1.5, -0.0], np.float16)})


@st.composite
def finite_halves(draw: st.DrawFn, shape: tuple[int, ...]) -> np.ndarray:
    bits = draw(hnp.arrays(np.uint16, shape))
    halves = bits.view(np.float16) if bits.ndim else np.float16(np.uint16(bits).view(np.float16))
    return np.where(np.isfinite(halves), halves, np.float16(-0.0)).astype(np.float16)


@st.composite
def quantized_tensors(draw: st.DrawFn, name: str) -> QuantizedTensor:
    rows, columns, bits = draw(st.integers(0, 5)), draw(st.integers(0, 5)), draw(st.integers(2, 8))
    limit = 2 ** (bits - 1) - 1
    symbols = draw(hnp.arrays(np.int8, (rows, columns), elements=st.integers(-limit, limit)))
    layout = draw(st.sampled_from(["plain", "transposed", "strided"]))
    if layout == "transposed":
        symbols = np.asfortranarray(symbols)
    elif layout == "strided":
        symbols = np.repeat(symbols, 2, axis=1)[:, ::2]
    return QuantizedTensor(name, symbols, draw(finite_halves((rows,))), bits)


@st.composite
def models(draw: st.DrawFn) -> QuantizedModel:
    names = draw(st.lists(st.sampled_from(NAMES), unique=True, max_size=8))
    split = draw(st.integers(0, len(names)))
    quantized = {name: draw(quantized_tensors(name)) for name in names[:split]}
    shapes = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3)
    passthrough = {name: draw(finite_halves(draw(shapes))) for name in names[split:]}
    lineage = draw(st.dictionaries(st.text(max_size=4), st.integers() | st.text(max_size=4), max_size=3))
    return QuantizedModel({"family": "golf_gpt"}, lineage, quantized, passthrough)


def assert_same(artifact: decode.Artifact, model: QuantizedModel) -> None:
    """Every array bit for bit, with its dtype, and both kinds of float32 weights."""
    expected = {name: np.ascontiguousarray(t.symbols) for name, t in model.quantized.items()}
    assert_arrays_equal(artifact.symbols, expected)
    assert_arrays_equal(artifact.scales, {name: t.row_scales for name, t in model.quantized.items()})
    assert_arrays_equal(artifact.passthrough, dict(model.passthrough))
    assert_arrays_equal(artifact.tensors, model.tensors())
    assert artifact.manifest["symbols_sha256"] == model.symbols_sha256()
    assert artifact.manifest["config"] == model.config
    assert artifact.manifest["lineage"] == model.lineage


def assert_arrays_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert found[name].tobytes() == array.tobytes(), name


@given(model=models(), codec=st.sampled_from([*codecs.CODECS, codecs.BEST]))
@settings(max_examples=150, deadline=None)
def test_decode_undoes_pack(model: QuantizedModel, codec: str) -> None:
    data = pack(model, PackSettings(codec=codec))
    assert_same(decode.decode(data), model)
    assert int.from_bytes(data[5:7], "little") == container.count_units(model)


@pytest.mark.parametrize(
    "model",
    [
        model_of(),
        model_of(tensor("w", [[5]], [1], 8)),
        model_of(tensor("w", np.zeros((0, 7)), [], 6)),
        model_of(tensor("w", np.zeros((7, 0)), [1] * 7, 6)),
        model_of(tensor("w", np.full((64, 64), 3), [1] * 64, 6)),
        model_of(tensor("w", np.tile([127, -127], (9, 30)), [65504] * 9, 8)),
        model_of(tensor("w", np.arange(64).reshape(8, 8).T, [6e-8] * 8, 8)),
        tiny_model(),
    ],
    ids=["empty", "1x1", "0 rows", "0 columns", "constant", "outliers", "transposed", "tiny"],
)
def test_edge_models_survive(model: QuantizedModel) -> None:
    assert_same(decode.decode(pack(model)), model)


def test_same_model_gives_same_bytes_whatever_the_order_of_its_tensors() -> None:
    model = tiny_model()
    backwards = QuantizedModel(
        dict(reversed(model.config.items())),
        model.lineage,
        dict(reversed(model.quantized.items())),
        dict(reversed(model.passthrough.items())),
    )
    assert pack(model) == pack(model) == pack(backwards)


def test_golden_artifact_still_decodes() -> None:
    golden = base64.b64decode(GOLDEN)
    assert hashlib.sha256(golden).hexdigest() == GOLDEN_SHA256
    assert_same(decode.decode(golden), tiny_model())


@pytest.mark.skipif(not brotli.__version__.startswith(GOLDEN_BROTLI), reason="another brotli may compress differently")
def test_golden_bytes() -> None:
    assert hashlib.sha256(pack(tiny_model())).hexdigest() == GOLDEN_SHA256


def test_inputs_are_untouched() -> None:
    model = tiny_model()
    before = {name: t.symbols.copy() for name, t in model.quantized.items()}
    pack(model)
    assert symbols_sha256(before) == model.symbols_sha256()


def test_best_is_the_smallest_of_every_codec_per_unit(tmp_path: Path) -> None:
    sizes = {}
    for codec in [*codecs.CODECS, codecs.BEST]:
        container.write_artifact(tmp_path / codec, pack(tiny_model(), PackSettings(codec=codec)))
        sizes[codec] = [unit.stored_bytes for unit in container.read_facts(tmp_path / codec).units]
    best = sizes.pop(codecs.BEST)
    assert best[1:] == [min(column) for column in zip(*sizes.values(), strict=True)][1:]


def test_every_codec_has_its_own_id_and_a_branch_in_the_decoder() -> None:
    raw = bytes(range(256)) * 3
    assert len({codec.id for codec in codecs.CODECS.values()}) == len(codecs.CODECS)
    for name, codec in codecs.CODECS.items():
        assert bytes(decode.inflate(codec.id, memoryview(codec.compress(raw)), len(raw))) == raw
        assert codecs.codec_name(codec.id) == name


def test_unknown_codec_names_the_valid_ones() -> None:
    with pytest.raises(SettingsError, match="unknown codec 'zip'; valid codecs: none, brotli, lzma, zlib, best"):
        parse_settings(PackSettings, {"codec": "zip"}, "flags")
    with pytest.raises(SettingsError, match="unknown codec id 9"):
        codecs.codec_name(9)


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


def test_blocks_share_one_row_and_a_change_of_bits_or_shape_starts_a_run() -> None:
    table = container.quantized_table(tiny_model())
    assert table == [["blocks.*.attn.q.weight", [0, 2, 4, 2, 2], [2, 1, 8, 1, 2]], ["tok_emb.weight", [0, 1, 6, 4, 3]]]


def test_units_report_the_whole_file(tmp_path: Path) -> None:
    data = pack(tiny_model())
    container.write_artifact(tmp_path / "a.pgolf", data)
    facts = container.read_facts(tmp_path / "a.pgolf")
    assert sum(unit.stored_bytes for unit in facts.units) == len(data)
    assert [unit.num_values for unit in facts.units] == [0, 10, 12, 9, 2]
    assert [unit.role for unit in facts.units if unit.kind == "symbols"] == ["blocks.*.attn.q.weight", "tok_emb.weight"]


def test_every_unit_is_announced() -> None:
    calls: list[int] = []
    pack(tiny_model(), on_unit=lambda: calls.append(1))
    assert len(calls) == container.count_units(tiny_model()) == 5


HALF = np.ones(1, np.float16)
REFUSED = [
    (model_of(tensor("w", [[32]], [1], 6)), "w: symbol ±32 at 6 bits, the limit is ±31"),
    (model_of(tensor("w", [[-128]], [1], 8)), "w: symbol ±128 at 8 bits, the limit is ±127"),
    (model_of(tensor("w", [[1]], [1], 9)), "w: 9 bits, expected 2 to 8"),
    (model_of(tensor("w", [[1]], [1, 2], 6)), r"w: row_scales are float16 \(2,\), expected float16 \(1,\)"),
    (model_of(tensor("w", [1], [1], 6)), r"w: symbols are int8 \(1,\), expected int8 \(out, in\)"),
    (model_of(QuantizedTensor("w", np.zeros((1, 1)), HALF, 6)), "w: symbols are float64"),
    (model_of(QuantizedTensor("w", np.zeros((1, 1), np.int8), np.ones(1), 6)), "w: row_scales are float64"),
    (model_of(g=np.ones(1, np.float32)), "g: passthrough dtype float32, expected float16"),
    (model_of(tensor("w", [[1]], [1], 6), w=HALF), "w: both quantized and passed through"),
    (model_of(**{"a.*.b": HALF}), r"'a.\*.b': a tensor name must be ASCII"),
    (model_of(größe=HALF), "a tensor name must be ASCII"),
    (QuantizedModel({}, {}, {"x": tensor("w", [[1]], [1], 6)}, {}), "x: holds a tensor named w"),
    (QuantizedModel({}, {"path": Path("a")}, {}, {}), "config and lineage must be plain JSON"),
    (QuantizedModel({}, {"loss": float("nan")}, {}, {}), "config and lineage must be plain JSON"),
    (model_of(g=np.zeros((0, 1 << 28), np.float16)), "longer than 134,217,728 in one dimension"),
]


@pytest.mark.parametrize(("model", "message"), REFUSED)
def test_what_the_format_cannot_hold_is_refused(model: QuantizedModel, message: str) -> None:
    with pytest.raises(MismatchError, match=message):
        pack(model)


def test_every_offender_is_listed() -> None:
    with pytest.raises(MismatchError, match=r"first: .*second: "):
        pack(model_of(tensor("first", [[99]], [1], 6), tensor("second", [[99]], [1], 6)))


def test_nan_and_infinity_are_refused() -> None:
    with pytest.raises(NumericsError, match="w row_scales, g"):
        pack(model_of(tensor("w", [[1]], [np.inf], 6), g=np.array([np.nan], np.float16)))


def test_a_manifest_over_the_limit_is_refused() -> None:
    with pytest.raises(PgolfError, match=r"the manifest has .* bytes; the limit is 1,048,576"):
        pack(QuantizedModel({"note": "x" * (1 << 20)}, {}, {}, {}))


def test_reading_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.pgolf"
    with pytest.raises(NotFoundError, match=r"a\.pgolf"):
        container.read_artifact(path)
    path.write_bytes(pack(tiny_model())[:-1])
    for read in (container.read_artifact, container.read_facts):
        with pytest.raises(DamagedFileError, match=r"a\.pgolf: unreadable artifact: cut short in unit 4"):
            read(path)


def test_a_failed_write_leaves_the_old_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "artifact.pgolf"
    container.write_artifact(path, b"old")

    def full_disk(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[:2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(PgolfError, match="No space left on device"):
        container.write_artifact(path, b"new bytes")
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["artifact.pgolf"]
