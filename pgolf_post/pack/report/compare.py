"""One model under every codec: real bytes, seconds there and back, and the distance to the entropy.

Codecs of two kinds. Those of the format make a whole artifact, which the decoder that ships decodes. The others,
marked, are yardsticks that only this toolkit can decode: their streams replace the symbol units, and the rest of the
artifact is counted as `rans` would store it. Every row was decoded again and compared before it is shown.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import brotli
import numpy as np

from pgolf_post.errors import SettingsError, VerificationError
from pgolf_post.pack import codecs, decode
from pgolf_post.pack.codecs import lrzip, zstd
from pgolf_post.pack.coder.frequency_tables import entropy
from pgolf_post.pack.coder.rans import fit
from pgolf_post.pack.container import SYMBOLS, Key, Layout, PackSettings, frame_units, pack_units
from pgolf_post.quantize.tensor import QuantizedModel

YARDSTICKS = ("zstd", "zstd-dictionary", "lrzip", "lrzip-similar")
ALL = (*codecs.CODECS, codecs.RANS, codecs.BEST, *YARDSTICKS)
SIMILARITY_ROWS = 1 << 13  # a greedy order takes rows² · columns steps


@dataclass(frozen=True)
class Row:
    """A codec's line in the table."""

    codec: str
    ships: bool  # the decoder that ships can decode it
    artifact_bytes: int
    symbol_bytes: int  # of the units of symbols, and of what the coder needs to read them
    encode_seconds: float
    decode_seconds: float
    role_bytes: dict[str, int]  # of every role's symbols


@dataclass(frozen=True)
class Comparison:
    """What `compare` found."""

    num_weights: int
    order0_bytes: float  # entropy of symbols, every role by its own histogram
    context_bytes: float  # empirical entropy of symbols in the contexts that rANS chose, tables not counted
    rows: tuple[Row, ...]
    missing: dict[str, str]  # codec: why it has no row


def check_names(names: Sequence[str]) -> list[str]:
    """The codecs meant; "all" means all. Raises SettingsError naming the valid ones."""
    wanted = list(ALL) if list(names) == ["all"] else list(names)
    unknown = [name for name in wanted if name not in ALL]
    if unknown:
        raise SettingsError(f"unknown codec {', '.join(unknown)}; valid codecs: all, {', '.join(ALL)}")
    return wanted


def compare(
    model: QuantizedModel, names: Sequence[str], on_codec: Callable[[str], object] = lambda _: None
) -> Comparison:
    """Measure these codecs. Raises SettingsError for an unknown one, VerificationError if one loses a symbol."""
    layout, rows = Layout(model), []
    missing: dict[str, str] = {}
    rest: int | None = None
    for name in check_names(names):
        if name.startswith("lrzip") and not lrzip.is_installed():
            missing[name] = "the program lrzip is not installed (apt-get install lrzip)"
        elif name in YARDSTICKS:
            rest = _rest_bytes(model) if rest is None else rest
            rows.append(_yardstick(layout, name, rest))
        else:
            rows.append(_shipped(model, layout, name))
        on_codec(name)
    order0 = sum(entropy(np.unique(u, return_counts=True)[1]) * u.size for u in _symbol_units(layout).values())
    _, fitted = fit([layout.blocks(key) for key in _symbol_units(layout)])
    num_weights = sum(tensor.symbols.size for tensor in model.quantized.values())
    return Comparison(num_weights, order0 / 8, sum(fitted.entropy_bits) / 8, tuple(rows), missing)


def _symbol_units(layout: Layout) -> dict[Key, np.ndarray]:
    keys = [key for key in sorted(layout.units) if key[0] == SYMBOLS]
    return {key: np.concatenate([array.ravel() for array in layout.units[key]]) for key in keys}


def _shipped(model: QuantizedModel, layout: Layout, name: str) -> Row:
    started = time.perf_counter()
    units = pack_units(model, PackSettings(codec=name))
    data = frame_units(units)
    encoded = time.perf_counter()
    manifest, _, _ = decode.decode(data)
    seconds = time.perf_counter() - encoded
    if manifest["symbols_sha256"] != model.symbols_sha256():
        raise VerificationError(f"{name}: decoded other symbols")
    keys = sorted(decode.lay_out(manifest)[0])
    sizes = dict(zip(keys, (len(stream) + decode.FRAME.size for _, stream in units[1:]), strict=True))
    roles: dict[str, int] = {}
    for key in (key for key in keys if key[0] == SYMBOLS):
        roles[layout.roles[key[1]]] = roles.get(layout.roles[key[1]], 0) + sizes[key]
    symbol_bytes = sum(size for key, size in sizes.items() if key[0] >= 2)
    return Row(name, True, len(data), symbol_bytes, encoded - started, seconds, roles)


def _rest_bytes(model: QuantizedModel) -> int:
    """Bytes of an artifact without its symbols: manifest, factors and passthrough."""
    units = pack_units(model, PackSettings(codec=codecs.RANS))
    keys = sorted(decode.lay_out(decode.decode(frame_units(units))[0])[0])
    frames = [len(stream) + decode.FRAME.size for _, stream in units]
    return len(decode.MAGIC) + frames[0] + sum(size for key, size in zip(keys, frames[1:], strict=True) if key[0] < 2)


def _yardstick(layout: Layout, name: str, rest_bytes: int) -> Row:
    """Symbol units, each by a codec that the format does not know."""
    started = time.perf_counter()
    keys = [key for key in sorted(layout.units) if key[0] == SYMBOLS]
    raws = {key: layout.raw(key) for key in keys}
    dictionary = zstd.train(list(raws.values())) if name == "zstd-dictionary" else b""
    side_bytes = len(dictionary)
    if name.startswith("lrzip"):
        arranged = {key: arrange(layout.units[key], name == "lrzip-similar") for key in keys}
        raws = {key: raw for key, (raw, _) in arranged.items()}
        side_bytes += len(brotli.compress(b"".join(order for _, order in arranged.values())))
        streams = {key: lrzip.compress(raw) if raw else b"" for key, raw in raws.items()}
    else:
        streams = {key: zstd.compress(raw, dictionary) for key, raw in raws.items()}
    encoded = time.perf_counter()
    for key, stream in streams.items():
        back = (
            (lrzip.decompress(stream) if stream else b"")
            if name.startswith("lrzip")
            else zstd.decompress(stream, dictionary)
        )
        if back != raws[key]:
            raise VerificationError(f"{name}: decoded other symbols of {layout.roles[key[1]]}")
    seconds = time.perf_counter() - encoded
    roles: dict[str, int] = {}
    for key, stream in streams.items():
        roles[layout.roles[key[1]]] = roles.get(layout.roles[key[1]], 0) + len(stream) + decode.FRAME.size
    symbol_bytes = sum(roles.values()) + side_bytes
    return Row(name, False, rest_bytes + symbol_bytes, symbol_bytes, encoded - started, seconds, roles)


def arrange(matrices: Sequence[np.ndarray], by_similarity: bool) -> tuple[bytes, bytes]:
    """(matrices transposed, one after another, and the orders of their rows as uint16): the record scripts' groups."""
    orders = [similarity_order(m) if by_similarity and len(m) <= SIMILARITY_ROWS else None for m in matrices]
    ordered = [m if order is None else m[order] for m, order in zip(matrices, orders, strict=True)]
    raw = b"".join(np.ascontiguousarray(m.T).tobytes() for m in ordered)
    return raw, b"".join(order.astype("<u2").tobytes() for order in orders if order is not None)


def similarity_order(symbols: np.ndarray) -> np.ndarray:  # (rows, columns) → (rows,) int
    """Rows in greedy order: each followed by the nearest (L1) of those left, from row 0 on."""
    left = np.arange(len(symbols))
    wide = symbols.astype(np.int32)
    order: list[int] = []
    while len(left):
        nearest = 0 if not order else int(np.abs(np.subtract(wide[left], wide[order[-1]])).sum(axis=1).argmin())
        order.append(int(left[nearest]))
        left = np.delete(left, nearest)
    return np.array(order, int)
