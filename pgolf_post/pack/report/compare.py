"""One model under every codec: real bytes, seconds to encode and decode, and the distance to the entropy.

Codecs that ship make a whole artifact, which the shipped decoder decodes. Yardsticks, marked in the table, can be
decoded by this toolkit only: their streams replace the symbol units, and the rest of the artifact is counted as `rans`
would store it. Every result was decoded again and compared before it is shown.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pgolf_post.base.progress import print_table, say
from pgolf_post.errors import SettingsError, VerificationError
from pgolf_post.pack import codecs, decode
from pgolf_post.pack.codecs.yardstick import SymbolUnit
from pgolf_post.pack.coder.frequency_tables import entropy
from pgolf_post.pack.coder.rans import fit
from pgolf_post.pack.container import SYMBOLS, Key, Layout, PackSettings, frame_units, pack_units
from pgolf_post.quantize.tensor import QuantizedModel

ALL = (*codecs.CHOICES, *codecs.YARDSTICKS)


@dataclass(frozen=True)
class CodecResult:
    """Size of the model under one codec."""

    codec: str
    ships: bool  # the shipped decoder can decode it
    artifact_bytes: int
    symbol_bytes: int  # of the units of symbols, with tables, orders and dictionaries needed to decode them
    encode_seconds: float
    decode_seconds: float
    role_bytes: dict[str, int]  # of the symbols of each role


@dataclass(frozen=True)
class Comparison:
    """One model under several codecs."""

    num_weights: int
    order0_bytes: float  # entropy of symbols, every role by its own histogram
    context_bytes: float  # empirical entropy of symbols in the contexts that rANS chose, tables not counted
    rows: tuple[CodecResult, ...]
    missing: dict[str, str]  # codec → why it was not measured


def check_names(names: Sequence[str]) -> list[str]:
    """Return the codecs meant; "all" means all. Raises SettingsError listing the valid ones."""
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
        if name not in codecs.YARDSTICKS:
            rows.append(_shipped(model, layout, name))
        elif reason := codecs.YARDSTICKS[name].missing():
            missing[name] = reason
        else:
            rest = _rest_bytes(model) if rest is None else rest
            rows.append(_yardstick(layout, name, rest))
        on_codec(name)
    order0 = sum(entropy(np.unique(u, return_counts=True)[1]) * u.size for u in _symbol_units(layout).values())
    _, fitted = fit([layout.blocks(key) for key in _symbol_units(layout)])
    num_weights = sum(tensor.symbols.size for tensor in model.quantized.values())
    return Comparison(num_weights, order0 / 8, sum(fitted.entropy_bits) / 8, tuple(rows), missing)


def _symbol_units(layout: Layout) -> dict[Key, np.ndarray]:
    keys = [key for key in sorted(layout.units) if key[0] == SYMBOLS]
    return {key: np.concatenate([array.ravel() for array in layout.units[key]]) for key in keys}


def _shipped(model: QuantizedModel, layout: Layout, name: str) -> CodecResult:
    """Measure a whole artifact, decoded by the shipped decoder. Raises VerificationError."""
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
    return CodecResult(name, True, len(data), symbol_bytes, encoded - started, seconds, roles)


def _rest_bytes(model: QuantizedModel) -> int:
    """Return the bytes of an artifact without its symbols: manifest, factors and passthrough."""
    units = pack_units(model, PackSettings(codec=codecs.RANS))
    keys = sorted(decode.lay_out(decode.decode(frame_units(units))[0])[0])
    frames = [len(stream) + decode.FRAME.size for _, stream in units]
    return len(decode.MAGIC) + frames[0] + sum(size for key, size in zip(keys, frames[1:], strict=True) if key[0] < 2)


def _yardstick(layout: Layout, name: str, rest_bytes: int) -> CodecResult:
    """Measure the symbol units under a codec that the format does not know. Raises VerificationError."""
    keys = [key for key in sorted(layout.units) if key[0] == SYMBOLS]
    started = time.perf_counter()
    encoded = codecs.YARDSTICKS[name].encode([SymbolUnit(layout.units[key], layout.raw(key)) for key in keys])
    encode_seconds = time.perf_counter() - started

    # decode every stream again, and compare
    started = time.perf_counter()
    for key, stream, raw in zip(keys, encoded.streams, encoded.raws, strict=True):
        if encoded.decompress(stream) != raw:
            raise VerificationError(f"{name}: decoded other symbols of {layout.roles[key[1]]}")
    decode_seconds = time.perf_counter() - started

    # a role can have two units, of int8 and of int16
    roles: dict[str, int] = {}
    for key, stream in zip(keys, encoded.streams, strict=True):
        roles[layout.roles[key[1]]] = roles.get(layout.roles[key[1]], 0) + len(stream) + decode.FRAME.size
    symbol_bytes = sum(roles.values()) + encoded.side_bytes
    return CodecResult(name, False, rest_bytes + symbol_bytes, symbol_bytes, encode_seconds, decode_seconds, roles)


def show(comparison: Comparison) -> None:
    """Print the table, the bytes by role, the entropies, and the codecs that were not measured."""
    rows = []
    for row in comparison.rows:
        bits = 8 * row.artifact_bytes / comparison.num_weights if comparison.num_weights else 0.0
        gap = row.symbol_bytes / comparison.context_bytes - 1 if comparison.context_bytes else 0.0
        seconds = (f"{row.encode_seconds:.2f}", f"{row.decode_seconds:.2f}")
        name = row.codec + ("" if row.ships else " *")
        rows.append((name, f"{row.artifact_bytes:,}", f"{bits:.4f}", f"{row.symbol_bytes:,}", f"{gap:+.2%}", *seconds))
    header = ("codec", "artifact bytes", "bits/weight", "symbol bytes", "over entropy", "encode s", "decode s")
    print_table(f"{comparison.num_weights:,} weights by every codec", header, rows)
    roles = sorted({role for row in comparison.rows for role in row.role_bytes})
    table = [(role, *(f"{row.role_bytes.get(role, 0):,}" for row in comparison.rows)) for role in roles]
    print_table("Symbol bytes by role", ("role", *(row.codec for row in comparison.rows)), table)
    entropies = f"{comparison.order0_bytes:,.0f} bytes by role, {comparison.context_bytes:,.0f} in rANS' contexts"
    say(f"entropy of the symbols: {entropies}")
    say("* not decodable by the shipped decoder; the rest of the artifact counted as rans stores it")
    for codec, reason in comparison.missing.items():
        say(f"no row for {codec}: {reason}")
