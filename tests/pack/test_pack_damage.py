"""Safe on any bytes: what the decoder that ships does with files that are not what was packed.

Two kinds of attack. *Damage* changes a file without knowing the format: it must end in ArtifactError or change nothing.
*Forgery* changes a part and repairs the checksum, so that it reaches the codecs and the tensor table: it may be valid,
but must never crash, hang or allocate much, and cannot change a symbol without changing the recorded sha256.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from pgolf_post.pack import codecs, decode
from pgolf_post.pack.container import PackSettings, frame_units, pack, pack_units
from pgolf_post.quantize.tensor import QuantizedModel, QuantizedTensor, ScaleFactor
from tests.pack.samples import sample_model

pytestmark = pytest.mark.slow

MIB = 1 << 20
PEAK_FACTOR = 24  # decoding may hold 24 times the declared size of the arrays …
FIXED_BYTES = 20 * MIB  # … and this whatever the file: the coder's tables, or lzma's dictionary
BROTLI_BOMB_BYTES = 64 * MIB  # a few input bytes may give brotli's whole 16 MiB window


@functools.cache
def packed_sample(codec: str = PackSettings().codec) -> bytes:
    """The artifact of the sample model, packed once: what these tests attack is its decoder."""
    return pack(sample_model(), PackSettings(codec=codec))


@functools.cache
def zeros_by(codec: str) -> bytes:
    """A stream of a few bytes that a codec makes 16 MiB of."""
    return codecs.CODECS[codec].compress(bytes(16 * MIB))


def contents(decoded: tuple[Any, Any, Any]) -> object:
    """All that decoding gives, comparable."""
    manifest, tensors, packed = decoded
    arrays = {name: (a.dtype.str, a.shape, a.tobytes()) for name, a in tensors.items()}
    return arrays, {name: comparable(tensor) for name, tensor in packed.items()}, manifest


def comparable(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return (value.dtype.str, value.shape, value.tobytes())
    return [comparable(part) for part in value] if isinstance(value, list | tuple) else value


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


def outcome(data: bytes) -> tuple[tuple[Any, Any, Any] | None, int]:
    """What decoding gives (None for ArtifactError; anything else propagates) and its peak allocation in bytes."""
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    try:
        with np.errstate(all="ignore"):  # a forged scale may be infinite
            decoded = decode.decode(data)
    except decode.ArtifactError:
        decoded = None
    return decoded, tracemalloc.get_traced_memory()[1] - before


@pytest.fixture
def traced() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


def check_damage(seed: int, num_mutations: int) -> int:
    """Mutate artifacts of every codec; return how many were refused."""
    rng = np.random.default_rng(seed)
    originals = [packed_sample(codec) for codec in codecs.CHOICES]
    expected = [contents(decode.decode(original)) for original in originals]
    limit_bytes = [peak_limit_bytes(original) for original in originals]
    refused = 0
    for number in range(num_mutations):
        original = originals[number % len(originals)]
        data = MUTATIONS[int(rng.integers(len(MUTATIONS)))](original, rng)
        artifact, peak_bytes = outcome(data)
        refused += artifact is None
        assert artifact is None or contents(artifact) == expected[number % len(originals)], (seed, number)
        assert peak_bytes <= limit_bytes[number % len(originals)], (seed, number)
    return refused


def declared_bytes(data: bytes) -> int:
    """The size that an artifact's manifest declares for its arrays."""
    manifest, *_ = decode.decode(data)
    parts = [(key, part[0]) for key, group in decode.lay_out(manifest)[0].items() for part in group]
    return sum(math.prod(shape) * decode.DTYPES[key[2]].itemsize for key, shape in parts)


def peak_limit_bytes(original: bytes) -> int:
    """What decoding anything derived from `original` may hold at once."""
    return PEAK_FACTOR * declared_bytes(original) + FIXED_BYTES


def test_damage_is_refused_or_changes_nothing(traced: None) -> None:
    assert check_damage(seed=1, num_mutations=400) > 360


@pytest.mark.long
def test_damage_is_refused_or_changes_nothing_at_length(traced: None) -> None:
    assert check_damage(seed=2, num_mutations=20_000) > 18_000


@pytest.mark.parametrize(
    ("codec", "shape"),
    [
        ("zlib", (1024, 512)),
        ("zlib", (2, 1 << 18)),
        ("rans", (96, 64)),
        pytest.param("rans", (1024, 512), marks=pytest.mark.long),  # minutes: every allocation is traced
        pytest.param("rans", (2, 1 << 18), marks=pytest.mark.long),
    ],
)
def test_an_honest_file_is_decoded_within_the_stated_memory(traced: None, codec: str, shape: tuple[int, int]) -> None:
    symbols = np.random.default_rng(0).integers(-31, 32, shape).astype(np.int8)
    factors = (ScaleFactor("row", np.ones(shape[0], np.float16)),)
    tensors = {f"blocks.{i}.w": QuantizedTensor(f"blocks.{i}.w", symbols, factors, shape) for i in (0, 1)}
    data = pack(QuantizedModel({}, {}, tensors, {}), PackSettings(codec=codec))
    limit_bytes = peak_limit_bytes(data)
    artifact, peak_bytes = outcome(data)
    assert artifact is not None
    assert peak_bytes <= limit_bytes


def test_every_single_byte_counts() -> None:
    data = packed_sample()
    for at in range(len(data)):
        with pytest.raises(decode.ArtifactError):
            decode.decode(data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :])
        with pytest.raises(decode.ArtifactError):
            decode.decode(data[:at])


# forgery


Unit = tuple[int, bytes]  # codec id, stream


def units_of(data: bytes) -> list[Unit]:
    return [(codec, bytes(stored)) for codec, stored in decode.read_units(memoryview(data))]


def forge(data: bytes, rng: np.random.Generator) -> bytes:
    """Change one unit (its stream, its codec, or for the manifest its JSON), with lengths and checksums right again."""
    units = units_of(data)
    number = int(rng.integers(len(units)))
    codec, stream = units[number]
    mutate = MUTATIONS[int(rng.integers(len(MUTATIONS)))]
    kind = int(rng.integers(3))
    if kind == 0:
        units[number] = (int(rng.integers(7)), stream)
    elif kind == 1 and stream:
        units[number] = (codec, mutate(stream, rng))
    else:
        manifest = bytes(decode.inflate(*units[0], decode.MAX_MANIFEST))
        units[0] = (0, mutate(manifest, rng))
    return frame_units(units)


def check_forgery(seed: int, num_mutations: int) -> None:
    rng = np.random.default_rng(seed)
    originals = [packed_sample(codec) for codec in codecs.CHOICES]
    limit_bytes = [peak_limit_bytes(original) + BROTLI_BOMB_BYTES for original in originals]
    symbols_sha256 = sample_model().symbols_sha256()
    for number in range(num_mutations):
        artifact, peak_bytes = outcome(forge(originals[number % len(originals)], rng))
        assert peak_bytes <= limit_bytes[number % len(originals)], (seed, number)
        assert artifact is None or artifact[0]["symbols_sha256"] == symbols_sha256


def test_forged_files_never_crash_and_never_change_a_symbol(traced: None) -> None:
    check_forgery(seed=3, num_mutations=300)


@pytest.mark.long
def test_forged_files_never_crash_and_never_change_a_symbol_at_length(traced: None) -> None:
    check_forgery(seed=4, num_mutations=20_000)


@pytest.mark.parametrize("codec", ["none", "brotli", "lzma", "zlib"])
@pytest.mark.parametrize("number", [0, 1, -1])
def test_a_decompression_bomb_is_refused(traced: None, codec: str, number: int) -> None:
    units = units_of(packed_sample())
    units[number] = (codecs.CODECS[codec].id, zeros_by(codec))
    data = frame_units(units)
    artifact, peak_bytes = outcome(data)
    assert artifact is None
    assert peak_bytes < {"brotli": BROTLI_BOMB_BYTES}.get(codec, FIXED_BYTES) + 2 * len(data)


# tables that promise what no file can hold


def forged_manifest(**changes: object) -> bytes:
    """A sample artifact with parts of its manifest replaced."""
    first, *units = pack_units(sample_model(), PackSettings(codec="none"))
    manifest = json.loads(bytes(decode.inflate(*first, decode.MAX_MANIFEST)))
    return frame_units([(0, json.dumps({**manifest, **changes}).encode()), *units])


HUGE = 1 << 26


@pytest.mark.parametrize(
    "rows",
    [
        [["w", 0, 0, [HUGE, 2], 0, [HUGE, 2], []]],
        [["w", 0, 0, [-1, -1], 0, [-1, -1], []]],
        [["w", 0, 0, [2.5], 0, [2.5], []]],
        [["w", 0, 0, [1 << 40], 0, [1 << 40, 1], []]],
        [["w", 0, 0, [HUGE], 2]],
        [["w", 0, 0, [1, 1], 0, [1, 1], [], [0, 0, 0, HUGE]]],
        [["w", 0, 0, [1, 1], 9, [1, 1], []]],
        [["w", 0, 0, [1, 1], 0, [1, 1], [], [9, 9, 9, 9]]],
        [["w", 0, 0, [None], 0, [1, 1], []]],
        [["w", 0, 0, {}, 0, [1, 1], []]],
        [["w"]],
        [[]],
        {"w": 1},
        None,
        "text",
        17,
        [[["w"], 0, 0, [1, 1], 0, [1, 1], []]],
        [["w", 0, 0, [1 << 19, 0], 0, [1 << 19, 0], []]],
    ],
)
def test_an_implausible_tensor_table_is_refused(traced: None, rows: object) -> None:
    artifact, peak_bytes = outcome(forged_manifest(tensors=rows))
    assert artifact is None
    assert peak_bytes < FIXED_BYTES


@pytest.mark.parametrize("each", [0, 1, HUGE])
def test_a_factor_that_is_spread_too_far_takes_no_memory(traced: None, each: int) -> None:
    """What a factor's values become is as large as its matrix, however many weights each of them claims to serve."""
    first, *units = pack_units(sample_model(), PackSettings(codec="rans"))
    manifest = json.loads(bytes(decode.inflate(*first, decode.MAX_MANIFEST)))
    factors = [factor for tensor in manifest["tensors"] for factor in tensor[7:]]
    assert factors
    for factor in factors:
        factor[2] = each
    _, peak_bytes = outcome(frame_units([(0, json.dumps(manifest).encode()), *units]))
    assert peak_bytes < peak_limit_bytes(packed_sample("rans"))


@pytest.mark.parametrize(
    "shapes",
    [
        [[1 << 26, 4], [1, 256], [2, 4]],
        [[4, 4], [1, 256], [1 << 24, 4]],
        [[4, 4], [1 << 24, 256], [2, 4]],
        [[0, 4], [1, 256], [2, 4]],
        [[4, 4], [1, 256], [2, 0]],
        [[4, 4], [1, 256], [300, 4]],
        [[4, 4]],
        [1, 2, 3],
        "text",
    ],
)
def test_implausible_coder_settings_are_refused(traced: None, shapes: object) -> None:
    first, *units = pack_units(sample_model(), PackSettings(codec="rans"))
    manifest = json.loads(bytes(decode.inflate(*first, decode.MAX_MANIFEST)))
    artifact, peak_bytes = outcome(frame_units([(0, json.dumps({**manifest, "rans": shapes}).encode()), *units]))
    assert artifact is None
    assert peak_bytes < FIXED_BYTES


def test_a_low_rank_pair_may_not_grow_beyond_its_matrix(traced: None) -> None:
    shapes = {"w": (1, 1), "w.lqA": (1 << 13, 1), "w.lqB": (1, 1 << 13)}
    rows = [[name, 0, 0, list(shape), 2] for name, shape in shapes.items()]
    halves = bytes(2 * sum(int(np.prod(shape)) for shape in shapes.values()))
    digest = QuantizedModel({}, {}, {}, {}).symbols_sha256()
    manifest = {"tensors": rows, "rans": [], "symbols_sha256": digest, "config": {}, "lineage": {}}
    artifact, peak_bytes = outcome(frame_units([(0, json.dumps(manifest).encode()), (0, halves)]))
    assert artifact is None
    assert peak_bytes < FIXED_BYTES


@pytest.mark.parametrize("raw", [b"", b"[" * 100_000, b"{}", b"[]", b"\xff", b"null", b'{"tensors":[]}', b"1" * 9999])
def test_a_manifest_that_is_not_one_is_refused(raw: bytes) -> None:
    units = units_of(packed_sample())
    with pytest.raises(decode.ArtifactError):
        decode.decode(frame_units([(0, raw), *units[1:]]))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no PGLF 2 artifact"),
        (b"GGUF" + bytes(100), "no PGLF 2 artifact"),
        (b"PGLF\x01" + bytes(100), "no PGLF 2 artifact"),
        (b"PGLF\x02", "missing 1 required positional argument"),
        (b"PGLF\x02\x00", "requires a buffer"),
        (packed_sample() + b"\0" * 9, "unit 14 is damaged"),
    ],
)
def test_what_is_wrong_is_said(data: bytes, message: str) -> None:
    with pytest.raises(decode.ArtifactError, match=message):
        decode.decode(data)


def test_symbols_of_another_tensor_are_caught_by_the_sha256() -> None:
    units = units_of(packed_sample("none"))
    sizes = [len(stream) for _, stream in units]
    first, second = next(
        (a, b) for a, b in itertools.combinations(range(1, len(units)), 2) if sizes[a] == sizes[b] == 288
    )
    units[first], units[second] = units[second], units[first]
    with pytest.raises(decode.ArtifactError, match="wrong sha256"):
        decode.decode(frame_units(units))
