"""The decoder that ships: one small file, alone in a fresh process, and safe on any bytes.

Two kinds of attack. *Damage* changes a file without knowing the format: it must end in ArtifactError or change nothing.
*Forgery* changes a part and repairs the checksum, so that it reaches the codecs and the tensor table: it may be valid,
but must never crash, hang or allocate much, and cannot change a symbol without changing the recorded sha256.
"""

from __future__ import annotations

import ast
import itertools
import json
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import brotli
import numpy as np
import pytest

from pgolf_post.pack import codecs, decode
from pgolf_post.pack.container import PackSettings, frame_unit, pack
from pgolf_post.quantize.tensor import QuantizedModel, QuantizedTensor

SOURCE = Path(decode.__file__)
MIB = 1 << 20
PEAK_FACTOR, PEAK_FLOOR_BYTES = 8, MIB // 2  # decoding may hold 8 times the declared size, and a little for any file
LZMA_BYTES = 17 * MIB  # lzma reserves its 16 MiB dictionary whatever the stream holds
BROTLI_BOMB_BYTES = MIB if decode.LIMIT else 64 * MIB  # before 1.2, a few input bytes may give a whole 16 MiB block


def sample_model(seed: int = 0) -> QuantizedModel:
    """A few hundred weights in three roles, with control tensors."""
    rng = np.random.default_rng(seed)
    quantized = {}
    for name in [f"blocks.{i}.{part}.weight" for i in range(3) for part in ("attn.q", "mlp.fc")] + ["tok_emb.weight"]:
        symbols = np.clip(np.rint(rng.normal(0, 3, (12, 8))), -31, 31).astype(np.int8)
        quantized[name] = QuantizedTensor(name, symbols, rng.uniform(0.01, 0.02, 12).astype(np.float16), 6)
    passthrough = {f"blocks.{i}.gain": rng.normal(size=4).astype(np.float16) for i in range(3)}
    return QuantizedModel({"family": "golf_gpt", "model": {"num_layers": 3}}, {"view": "raw"}, quantized, passthrough)


def contents(artifact: decode.Artifact) -> object:
    """All that decoding gives, comparable."""
    parts = (artifact.symbols, artifact.scales, artifact.passthrough, artifact.tensors)
    arrays = [{name: (a.dtype.str, a.shape, a.tobytes()) for name, a in part.items()} for part in parts]
    return arrays, artifact.manifest


# one file, alone


def test_the_decoder_is_small_and_imports_only_what_ships() -> None:
    assert SOURCE.stat().st_size <= 8192
    imported = set()
    for node in ast.walk(ast.parse(SOURCE.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module or "")
    assert {name.split(".")[0] for name in imported} <= {"numpy", "brotli", *sys.stdlib_module_names}


def test_every_dtype_is_explicit_about_byte_order() -> None:
    literals = [node.value for node in ast.walk(ast.parse(SOURCE.read_text())) if isinstance(node, ast.Constant)]
    assert "<f2" in literals
    assert decode.HEADER.format.startswith("<")
    assert decode.FRAME.format.startswith("<")


@pytest.fixture
def alone(tmp_path: Path) -> Path:
    """A folder with a copy of decode.py, an artifact, and a `site` that holds numpy and brotli and nothing else."""
    (tmp_path / "decode.py").write_bytes(SOURCE.read_bytes())
    (tmp_path / "a.pgolf").write_bytes(pack(sample_model()))
    site = tmp_path / "site"
    site.mkdir()
    for package in (Path(np.__file__).parent, Path(brotli.__file__)):
        for path in package.parent.iterdir():
            if path.name.lstrip("_").startswith(("numpy", "brotli")) and not (site / path.name).exists():
                (site / path.name).symlink_to(path)
    return tmp_path


ALONE = """
import runpy, sys
sys.path.append("site")
sys.argv = ["decode.py", "a.pgolf"]
namespace = runpy.run_path("decode.py", run_name="__main__")
import numpy as np
with open("a.pgolf", "rb") as file:
    np.savez("tensors.npz", **namespace["decode"](file.read()).tensors)
assert not {"pgolf_post", "torch", "pydantic"} & set(sys.modules)
try:
    import pgolf_post
except ImportError:
    print("alone")
"""


def test_a_fresh_process_without_this_package_decodes_the_same(alone: Path) -> None:
    done = run_python(alone, "-I", "-S", "-c", ALONE)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "alone"
    assert lines[-2] == sample_model().symbols_sha256()
    expected = sample_model().tensors()
    assert {line.split()[0] for line in lines[:-2]} == expected.keys()
    with np.load(alone / "tensors.npz") as found:
        assert set(found.files) == expected.keys()
        assert all(found[name].tobytes() == array.tobytes() for name, array in expected.items())


def test_the_command_prints_a_summary_or_one_line_of_error(alone: Path) -> None:
    done = run_python(alone, "-I", "decode.py", "a.pgolf")
    assert done.returncode == 0, done.stderr
    assert "tok_emb.weight (12, 8)" in done.stdout
    (alone / "a.pgolf").write_bytes(b"PGLF\x01")
    done = run_python(alone, "-I", "decode.py", "a.pgolf")
    assert (done.returncode, done.stderr) == (1, "a.pgolf: unreadable artifact: not a PGLF artifact\n")


def run_python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, capture_output=True, text=True, timeout=60, check=False
    )


def test_a_brotli_without_output_limits_is_fed_in_small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "LIMIT", {})
    monkeypatch.setattr(decode, "PIECE_BYTES", 16)
    data = pack(sample_model())
    assert contents(decode.decode(data)) == contents(decode.decode(pack(sample_model())))
    noise = np.random.default_rng(0).bytes(1000)
    assert decode.inflate(1, memoryview(brotli.compress(noise)), len(noise)) == noise


# damage


Mutation = Callable[[bytes, np.random.Generator], bytes]


def flip_bit(data: bytes, rng: np.random.Generator) -> bytes:
    at = int(rng.integers(len(data)))
    return data[:at] + bytes([data[at] ^ (1 << int(rng.integers(8)))]) + data[at + 1 :]


def set_bytes(data: bytes, rng: np.random.Generator) -> bytes:
    at, length = int(rng.integers(len(data))), int(rng.integers(1, 9))
    return data[:at] + rng.bytes(length) + data[at + length :]


def set_extreme_number(data: bytes, rng: np.random.Generator) -> bytes:
    at, value = int(rng.integers(len(data))), int(rng.choice([0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]))
    return data[:at] + value.to_bytes(4, "little") + data[at + 4 :]


def truncate(data: bytes, rng: np.random.Generator) -> bytes:
    return data[: int(rng.integers(len(data)))]


def append(data: bytes, rng: np.random.Generator) -> bytes:
    return data + rng.bytes(int(rng.integers(1, 40)))


def insert(data: bytes, rng: np.random.Generator) -> bytes:
    at = int(rng.integers(len(data)))
    return data[:at] + rng.bytes(int(rng.integers(1, 9))) + data[at:]


def delete(data: bytes, rng: np.random.Generator) -> bytes:
    at = int(rng.integers(len(data)))
    return data[:at] + data[at + int(rng.integers(1, 40)) :]


def repeat(data: bytes, rng: np.random.Generator) -> bytes:
    start, end = sorted(int(n) for n in rng.integers(len(data), size=2))
    return data[:end] + data[start:end] + data[end:]


def zero(data: bytes, rng: np.random.Generator) -> bytes:
    start, end = sorted(int(n) for n in rng.integers(len(data), size=2))
    return data[:start] + bytes(end - start) + data[end:]


MUTATIONS: list[Mutation] = [
    flip_bit,
    set_bytes,
    set_extreme_number,
    truncate,
    append,
    insert,
    delete,
    repeat,
    zero,
]


def outcome(data: bytes) -> tuple[decode.Artifact | None, int]:
    """What decoding gives (None for ArtifactError; anything else propagates) and its peak allocation in bytes."""
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    try:
        artifact = decode.decode(data)
        with np.errstate(all="ignore"):  # a forged scale may be infinite
            artifact.tensors
    except decode.ArtifactError:
        artifact = None
    return artifact, tracemalloc.get_traced_memory()[1] - before


@pytest.fixture
def traced() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


def check_damage(seed: int, num_mutations: int) -> int:
    """Mutate artifacts of every codec; return how many were refused."""
    rng = np.random.default_rng(seed)
    originals = [pack(sample_model(), PackSettings(codec=codec)) for codec in [*codecs.CODECS, codecs.BEST]]
    expected = contents(decode.decode(originals[0]))
    refused = 0
    for number in range(num_mutations):
        original = originals[number % len(originals)]
        data = MUTATIONS[int(rng.integers(len(MUTATIONS)))](original, rng)
        artifact, peak_bytes = outcome(data)
        refused += artifact is None
        assert artifact is None or contents(artifact) == expected, (seed, number)
        assert peak_bytes <= peak_limit_bytes(original), (seed, number)
    return refused


def peak_limit_bytes(original: bytes) -> int:
    """What decoding anything derived from `original` may hold at once, from the size that `original` declares."""
    units = decode.read_units(memoryview(original))
    lzma_bytes = LZMA_BYTES if any(codec == codecs.CODECS["lzma"].id for codec, _, _ in units) else 0
    return PEAK_FACTOR * sum(raw_bytes for _, _, raw_bytes in units) + PEAK_FLOOR_BYTES + lzma_bytes


def test_damage_is_refused_or_changes_nothing(traced: None) -> None:
    assert check_damage(seed=1, num_mutations=1000) > 900


@pytest.mark.long
def test_damage_is_refused_or_changes_nothing_at_length(traced: None) -> None:
    assert check_damage(seed=2, num_mutations=20_000) > 18_000


def test_an_honest_file_is_decoded_within_the_stated_memory(traced: None) -> None:
    symbols = np.random.default_rng(0).integers(-31, 32, (1024, 1024)).astype(np.int8)
    tensors = {f"blocks.{i}.w": QuantizedTensor(f"blocks.{i}.w", symbols, np.ones(1024, np.float16), 6) for i in (0, 1)}
    data = pack(QuantizedModel({}, {}, tensors, {}), PackSettings(codec="zlib"))
    artifact, peak_bytes = outcome(data)
    assert artifact is not None
    assert peak_bytes <= peak_limit_bytes(data)


def test_every_single_byte_counts() -> None:
    data = pack(sample_model())
    for at in range(len(data)):
        with pytest.raises(decode.ArtifactError):
            decode.decode(data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :])
        with pytest.raises(decode.ArtifactError):
            decode.decode(data[:at])


# forgery


Unit = tuple[int, bytes, int]  # codec id, stream, raw size


def seal(units: Sequence[Unit]) -> bytes:
    """A file with right lengths and checksums around any units."""
    data = decode.HEADER.pack(decode.MAGIC, decode.VERSION, len(units))
    for codec, stream, raw_bytes in units:
        frame = decode.FRAME.pack(codec, len(stream), raw_bytes, 0)[:-4]
        data += frame + zlib.crc32(stream, zlib.crc32(frame)).to_bytes(4, "little") + stream
    return data


def units_of(data: bytes) -> list[Unit]:
    return [(codec, bytes(stored), raw) for codec, stored, raw in decode.read_units(memoryview(data))]


def forge(data: bytes, rng: np.random.Generator) -> bytes:
    """Change one unit (its stream, or for the manifest its JSON) or one frame field and repair the checksum."""
    units = units_of(data)
    number = int(rng.integers(len(units)))
    codec, stream, raw_bytes = units[number]
    mutate = MUTATIONS[int(rng.integers(len(MUTATIONS)))]
    kind = int(rng.integers(4))
    if kind == 0:
        units[number] = (int(rng.integers(6)), stream, raw_bytes)
    elif kind == 1:
        units[number] = (codec, stream, int(rng.choice([0, 1, raw_bytes + 1, 1 << 20, 0xFFFFFFFF])))
    elif kind == 2:
        units[number] = (codec, mutate(stream, rng), raw_bytes)
    else:
        manifest = mutate(bytes(decode.inflate(*units[0])), rng)  # type: ignore[arg-type]
        units[0] = (0, manifest, len(manifest))
    return seal(units)


def check_forgery(seed: int, num_mutations: int) -> None:
    rng = np.random.default_rng(seed)
    originals = [pack(sample_model(), PackSettings(codec=codec)) for codec in codecs.CODECS]
    symbols_sha256 = sample_model().symbols_sha256()
    for number in range(num_mutations):
        original = originals[number % len(originals)]
        artifact, peak_bytes = outcome(forge(original, rng))
        assert peak_bytes <= peak_limit_bytes(original) + LZMA_BYTES, (seed, number)  # a forged codec id may be lzma
        if artifact is not None:
            assert decode.symbols_sha256(artifact.symbols) == artifact.manifest["symbols_sha256"] == symbols_sha256


def test_forged_files_never_crash_and_never_change_a_symbol(traced: None) -> None:
    check_forgery(seed=3, num_mutations=1000)


@pytest.mark.long
def test_forged_files_never_crash_and_never_change_a_symbol_at_length(traced: None) -> None:
    check_forgery(seed=4, num_mutations=20_000)


@pytest.mark.parametrize("codec", ["none", "brotli", "lzma", "zlib"])
@pytest.mark.parametrize("number", [0, 1, -2, -1])
def test_a_decompression_bomb_is_refused(traced: None, codec: str, number: int) -> None:
    units = units_of(pack(sample_model()))
    bomb = codecs.CODECS[codec].compress(bytes(16 * MIB))
    units[number] = (codecs.CODECS[codec].id, bomb, units[number][2])
    data = seal(units)
    artifact, peak_bytes = outcome(data)
    assert artifact is None
    assert peak_bytes < {"lzma": LZMA_BYTES, "brotli": BROTLI_BOMB_BYTES}.get(codec, MIB)


def forged_manifest(**changes: object) -> bytes:
    units = units_of(pack(sample_model()))
    manifest = json.loads(bytes(decode.inflate(*units[0])))  # type: ignore[arg-type]
    raw = json.dumps(manifest | changes).encode()
    return seal([(0, raw, len(raw)), *units[1:]])


@pytest.mark.parametrize(
    "rows",
    [
        [["w", [0, 1, 8, 1 << 26, 1 << 26]]],
        [["w", [0, 1, 8, 1 << 14, 1 << 14]]],
        [["blocks.*", [0, 1 << 27, 8, 0, 0]]],
        [["blocks.*", *[[0, 1 << 14, 8, 0, 0]] * 9]],
        [["w", [0, 1, 8, -1, -1]]],
        [["w", [0, 1, 8, 1.0, True]]],
        [["w", [0, 1, 8, 10**400, 1]]],
        [["w", [0, 1, 8, 2, 2, 2]]],
        [["w", [0, 1, 8]]],
        [["w", [0]]],
        [["w", 7]],
        [[]],
        [[5, [0, 1, 8, 1, 1]]],
        [["w", [0, 1, 8, 1, 1]], ["w", [0, 1, 8, 1, 1]]],
        [["blocks.0.gain", [0, 1, 8, 1, 1]]],
        [["\ud800", [0, 1, 8, 1, 1]]],
        {"w": 1},
        None,
        "text",
    ],
)
def test_an_implausible_tensor_table_is_refused(traced: None, rows: object) -> None:
    data = forged_manifest(quantized=rows)
    artifact, peak_bytes = outcome(data)
    assert artifact is None
    assert peak_bytes < 8 * MIB


@pytest.mark.parametrize("raw", [b"", b"[" * 100_000, b"{}", b"[]", b"\xff", b"null", b'{"quantized":[]}', b"1" * 9999])
def test_a_manifest_that_is_not_one_is_refused(raw: bytes) -> None:
    units = units_of(pack(sample_model()))
    with pytest.raises(decode.ArtifactError):
        decode.decode(seal([(0, raw, len(raw)), *units[1:]]))


def test_a_file_with_consistent_but_huge_claims_is_refused_before_decompressing(traced: None) -> None:
    side = 1 << 14  # 2^28 symbols that compress to a few hundred bytes
    claimed = {"quantized": [["w", [0, 1, 8, side, side]]], "passthrough": [], "symbols_sha256": ""}
    data = seal(
        [units_of(frame(json.dumps(claimed).encode()))[0], (1, b"", side * side), (1, b"", 2 * side), (1, b"", 0)]
    )
    tracemalloc.reset_peak()
    with pytest.raises(decode.ArtifactError, match="bytes of tensors, over 134217728"):
        decode.decode(data)
    assert tracemalloc.get_traced_memory()[1] < MIB


def frame(raw: bytes) -> bytes:
    return decode.HEADER.pack(decode.MAGIC, decode.VERSION, 1) + frame_unit(raw, "brotli")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a PGLF artifact"),
        (b"GGUF" + bytes(100), "not a PGLF artifact"),
        (b"PGLF\x02" + bytes(100), "format version 2, not 1"),
        (b"PGLF\x01\x00\x00", "not enough values"),
        (b"PGLF\x01\x01\x00", "cut short at unit 0"),
        (pack(sample_model()) + b"\0", "1 bytes after the last unit"),
    ],
)
def test_what_is_wrong_is_said(data: bytes, message: str) -> None:
    with pytest.raises(decode.ArtifactError, match=message):
        decode.decode(data)


def test_an_earlier_symbol_order_is_caught_by_the_sha256() -> None:
    units = units_of(pack(sample_model(), PackSettings(codec="none")))
    for first, second in itertools.pairwise(range(1, 4)):
        swapped = list(units)
        swapped[first] = (0, units[first][1][::-1], units[first][2])
        swapped[second] = (0, units[second][1][::-1], units[second][2])
        with pytest.raises(decode.ArtifactError, match="wrong sha256 of symbols"):
            decode.decode(seal(swapped))
