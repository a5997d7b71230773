"""The entropy coder: as small as its contexts' entropy, never wrong, and no worse where there is nothing to gain."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from click.testing import CliRunner

from pgolf_post.cli.compress import command
from pgolf_post.errors import NotFoundError, SettingsError
from pgolf_post.pack import codecs
from pgolf_post.pack.artifact import unpack, write_artifact
from pgolf_post.pack.codecs import lrzip, zstd
from pgolf_post.pack.coder import contexts, frequency_tables, rans, row_shifts
from pgolf_post.pack.container import PackSettings, block_of, pack
from pgolf_post.pack.decode import RANS
from pgolf_post.pack.report import compare
from pgolf_post.quantize.gptq.trellis import Trellis, first_bits
from pgolf_post.quantize.tensor import QuantizedModel, QuantizedTensor, ScaleFactor

pytestmark = pytest.mark.slow


def gaussian_model(row_spread: float, column_spread: float, blocks: int = 2, seed: int = 0) -> QuantizedModel:
    """Two roles of Gaussian symbols whose deviation varies log-normally over rows and columns."""
    rng = np.random.default_rng(seed)
    quantized = {}
    for name in [f"blocks.{i}.{part}.weight" for i in range(blocks) for part in ("mlp.fc", "attn.q")]:
        rows, columns = (512, 256) if "fc" in name else (256, 256)
        deviation = 3 * np.exp(rng.normal(0, row_spread, (rows, 1)) + rng.normal(0, column_spread, columns))
        symbols = np.clip(np.rint(rng.normal(0, 1, (rows, columns)) * deviation), -127, 127).astype(np.int8)
        factor = ScaleFactor("row", rng.integers(-40, -20, rows).astype(np.int8))
        quantized[name] = QuantizedTensor(name, symbols, (factor,), symbols.shape)
    return QuantizedModel({}, {}, quantized, {"gain": np.ones(3, np.float16)})


def order0_bytes(model: QuantizedModel) -> float:
    symbols = np.concatenate([tensor.symbols.ravel() for tensor in model.quantized.values()])
    return frequency_tables.entropy(np.unique(symbols, return_counts=True)[1]) * symbols.size / 8


@pytest.mark.parametrize(("row_spread", "column_spread"), [(0, 0), (0, 0.3), (0.5, 0), (0.4, 0.4)])
def test_the_stream_is_as_long_as_the_entropy_of_its_contexts(row_spread: float, column_spread: float) -> None:
    found = compare.compare(gaussian_model(row_spread, column_spread), ["rans"])
    (ours,) = found.rows
    assert found.context_bytes <= ours.symbol_bytes < 1.015 * found.context_bytes  # 400K weights: tables weigh more


@pytest.mark.parametrize("spread", [0, 0.4])
def test_it_takes_fewer_bytes_than_brotli(spread: float) -> None:
    ours, theirs = compare.compare(gaussian_model(spread, spread, blocks=1), ["rans", "brotli"]).rows
    assert ours.artifact_bytes < theirs.artifact_bytes


def test_row_and_column_scales_are_worth_more_than_three_percent() -> None:
    model = gaussian_model(0.35, 0.35)
    assert len(pack(model)) <= 0.97 * order0_bytes(model)


def test_equal_rows_cost_no_side_information() -> None:
    model = gaussian_model(0, 0.2)
    blocks = [contexts.make_block([t.symbols], None) for t in model.quantized.values()]
    shifted, _ = rans.fit([blocks])
    assert len({int(shift) for block in shifted[0] for shift in block.row_shifts.ravel()}) == 1


def test_rows_that_nearly_repeat_are_coded_as_differences() -> None:
    rng = np.random.default_rng(0)
    symbols = rng.integers(-9, 10, (64, 256)).astype(np.int8)
    symbols[20:40] = symbols[19] + rng.integers(0, 2, (20, 256))
    block = row_shifts.with_residuals(contexts.make_block([symbols], None))
    assert np.flatnonzero(block.row_shifts[0] & contexts.DIFFERENCE).tolist() == list(range(20, 40))
    model = QuantizedModel({}, {}, {"w": QuantizedTensor("w", symbols, (), symbols.shape)}, {})
    assert np.array_equal(unpack(pack(model)).symbols["w"], symbols)


@pytest.mark.parametrize("states", [0, 4, 64])
@pytest.mark.parametrize("kind", RANS)
@pytest.mark.parametrize("dtype", [np.int8, np.int16])
def test_compiled_loops_give_the_same_bytes(states: int, kind: int, dtype: type) -> None:
    rng = np.random.default_rng(states)
    matrices = [np.rint(rng.normal(0, 6, (40, 17))).astype(dtype) for _ in range(3)]
    matrices[0][7, 3] = np.iinfo(dtype).min  # an escape
    matrices[1][20:30] = matrices[1][19]  # differences
    steps = [rng.integers(-9, 10, (40, 17)).astype(np.int16) for _ in matrices]
    made = contexts.make_block(matrices, Trellis(states, 16) if states else None, steps)
    block = replace(row_shifts.with_row_shifts([made])[0], kind=kind)
    walks = [contexts.levels_of(block, compiled) for compiled in (False, True)]
    for ours, theirs in zip(*walks, strict=True):
        assert np.array_equal(ours, theirs)
    model = frequency_tables.fit_tables([contexts.histogram(block, *walks[0])])
    found = []
    for compiled in (False, True):
        lanes = np.full(8, rans.LOW, np.int64)
        coder = rans.Coder(frequency_tables.frequencies(model.weights), lanes)
        stream = coder.encode_role([block, block], [walks[0]] * 2, model.classes[0], compiled)
        found.append((stream, lanes.tolist()))
    assert found[0] == found[1]
    assert len(found[0][0]) > 1000


@pytest.mark.parametrize("axis", ["row", "column"])
@pytest.mark.parametrize("common", [0, -90])
def test_what_integer_factors_say_is_not_stored_again(axis: Literal["row", "column"], common: int) -> None:
    """Weights of one deviation under steps that vary: the factors alone say how large each symbol will be."""
    rng = np.random.default_rng(0)
    eighths = rng.integers(-12, 13, 256)
    sigma = 6 * 2.0 ** (-eighths / 8)
    symbols = np.rint(rng.normal(0, 1, (256, 256)) * (sigma[:, None] if axis == "row" else sigma)).astype(np.int8)
    sizes = []
    for values in (eighths + common, rng.permutation(eighths) + common):
        tensor = QuantizedTensor("w", symbols, (ScaleFactor(axis, values.astype(np.int8)),), symbols.shape)
        coded = rans.encode([[block_of([tensor])]])
        assert axis == "column" or (len(set(coded.row_shifts[0].tolist())) == 1) == (not sizes)
        sizes.append(coded.unit_bits[0])
        assert np.array_equal(unpack(pack(QuantizedModel({}, {}, {"w": tensor}, {}))).symbols["w"], symbols)
    assert sizes[0] < sizes[1] - 400


def test_scales_are_as_precise_as_they_pay() -> None:
    """Of wide rows that differ by half an octave every shift is stored, of narrow ones hardly any."""
    rng, kinds = np.random.default_rng(0), []
    for columns in (4, 1024):
        symbols = np.rint(rng.normal(0, 5, (128, columns)) * np.exp2(rng.integers(-1, 2, (128, 1)) / 2)).astype(np.int8)
        shifted = row_shifts.with_row_shifts([contexts.make_block([symbols], None)])
        kinds.append(frequency_tables.entropy(np.bincount(shifted[0].row_shifts.ravel())))
    assert kinds[0] < 0.6 < 1.4 < kinds[1]


def test_the_trellis_bit_is_a_context() -> None:
    """Symbols of odd states are centred on -1/2: knowing the bit must save what the mixture loses."""
    rng, trellis = np.random.default_rng(0), Trellis(8, 64)
    symbols = np.zeros((256, 256), np.int8)
    for row in range(256):
        bits = first_bits(symbols[: row + 1], trellis)[row]
        symbols[row] = np.rint((rng.normal(0, 3, 256) - bits) / 2)
    tensors = [QuantizedTensor("w", symbols, (), symbols.shape, kind) for kind in (trellis, None)]
    with_bit, without = (len(pack(QuantizedModel({}, {}, {"w": tensor}, {}))) for tensor in tensors)
    assert with_bit < 0.995 * without


def test_levels_and_bits_are_what_the_decoder_recomputes() -> None:
    symbols = np.random.default_rng(0).integers(-3, 4, (70, 6)).astype(np.int8)
    trellis = Trellis(16, 32)
    _, odds = contexts.levels_of(contexts.make_block([symbols], trellis))
    assert np.array_equal(odds, first_bits(symbols, trellis))


def test_stored_tables_give_every_occurring_symbol_a_frequency() -> None:
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 2, (40, contexts.ENTRIES)) * rng.integers(1, 10**6, (40, contexts.ENTRIES))
    counts[:, 0] = 0
    freqs = frequency_tables.frequencies(frequency_tables.weights_of(counts))
    assert (freqs.sum(axis=1) == frequency_tables.TOTAL).all()
    assert ((freqs > 0).sum(axis=1) > 50).all()


@pytest.mark.parametrize(
    ("num_symbols", "lanes"), [(0, 4), (10**5, 4), (4_600_000, 64), (36_000_000, 512), (10**9, 4096)]
)
def test_lanes_cost_little(num_symbols: int, lanes: int) -> None:
    assert rans.lane_count(num_symbols) == lanes


# the comparison


def test_every_codec_has_a_row_or_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    symbols = np.random.default_rng(0).integers(-9, 10, (64, 128)).astype(np.int8)
    factor = ScaleFactor("row", np.full(64, -30, np.int8))
    tensors = [QuantizedTensor(f"blocks.{i}.mlp.fc.weight", symbols, (factor,), symbols.shape) for i in (0, 1)]
    model = QuantizedModel({}, {}, {tensor.name: tensor for tensor in tensors}, {"gain": np.ones(3, np.float16)})
    found = compare.compare(model, ["all"])
    assert {row.codec for row in found.rows} | set(found.missing) == set(compare.ALL)
    sizes = {row.codec: row.artifact_bytes for row in found.rows if row.ships}
    assert sizes["best"] == min(sizes.values())
    assert all(row.artifact_bytes > row.symbol_bytes >= sum(row.role_bytes.values()) for row in found.rows)
    monkeypatch.setattr(lrzip, "PROGRAM", "no-such-program")
    assert compare.compare(model, ["lrzip"]).missing == {
        "lrzip": "the program lrzip is not installed (apt-get install lrzip)"
    }
    with pytest.raises(NotFoundError, match="no-such-program is not installed"):
        lrzip.compress(b"abc")


@pytest.mark.skipif(bool(lrzip.missing()), reason="lrzip is a package of its own")
def test_lrzip_there_and_back() -> None:
    raw = np.random.default_rng(0).integers(-5, 6, 5000).astype(np.int8).tobytes()
    assert lrzip.decompress(lrzip.compress(raw)) == raw


def test_zstd_there_and_back() -> None:
    raw = np.random.default_rng(0).integers(-5, 6, 50_000).astype(np.int8).tobytes()
    for dictionary in (b"", zstd.train([raw] * 20)):
        assert zstd.decompress(zstd.compress(raw, dictionary), dictionary) == raw


def test_yardsticks_are_never_in_an_artifact() -> None:
    for name in codecs.YARDSTICKS:
        assert name not in codecs.CHOICES
        with pytest.raises(ValueError, match="unknown codec"):
            PackSettings(codec=name)
    with pytest.raises(SettingsError, match="unknown codec zip; valid codecs: all, none, brotli"):
        compare.check_names(["rans", "zip"])


def test_similar_rows_are_neighbours() -> None:
    base = np.random.default_rng(0).integers(-50, 51, (2, 30))
    rows = np.array([base[0], base[1], base[0] + 1, base[1] + 1, base[0] + 2])
    assert lrzip.similarity_order(rows).tolist() == [0, 2, 4, 3, 1]


def test_the_command_leaves_the_artifact_alone(tmp_path: Path) -> None:
    path = tmp_path / "artifact.pgolf"
    write_artifact(path, pack(gaussian_model(0, 0.2, blocks=1)))
    before = path.read_bytes()
    result = CliRunner().invoke(command, [str(tmp_path), "--codecs", "rans,zlib,zstd", "--json"])
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert [(row["codec"], row["ships"]) for row in answer["rows"]] == [("rans", True), ("zlib", True), ("zstd", False)]
    assert answer["rows"][0]["artifact_bytes"] == len(before)
    assert path.read_bytes() == before
    assert "in rANS' contexts" in result.stderr
