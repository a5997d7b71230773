"""Decode an artifact (container.py: format, rans.py: coder): standard library, numpy and brotli only."""

import hashlib
import json
import lzma
import math
import struct
import zlib
from itertools import groupby

import brotli
import numpy as np

MAGIC, FRAME = b"PGLF\2", struct.Struct("<BII")
MAX_BYTES, MAX_MANIFEST, MAX_WIDTH = 1 << 27, 1 << 20, 1 << 20
DTYPES = [np.dtype(code) for code in ("<i1", "<i2", "<f2", "<u2", "<f4")]
MANTISSAS = np.array([256, 279, 304, 332, 362, 395, 431, 470])


class ArtifactError(ValueError):
    pass


def need(condition, message):
    if not condition:
        raise ArtifactError(message)


def decode(data):
    """(manifest, tensors as float32, as packed: arrays or (symbols, shape, trellis, factors))."""
    try:
        return build(*read_units(memoryview(data)))
    except Exception as error:
        raise ArtifactError(f"damaged artifact: {error}") from error


def read_units(data):
    need(data[:5] == MAGIC, "no PGLF 2 artifact")
    units, at = [], 5
    while at < len(data):
        codec, size, crc = FRAME.unpack_from(data, at)
        head, start, at = data[at : at + 5], at + 9, at + 9 + size
        need(at <= len(data) and zlib.crc32(data[start:at], zlib.crc32(head)) == crc, f"unit {len(units)} is damaged")
        units.append((codec, data[start:at]))
    return units


def build(first, *units):
    manifest, arrays = json.loads(bytes(inflate(*first, MAX_MANIFEST))), {}
    for (key, parts), (codec, data) in zip(lay_out(manifest), units, strict=True):
        dtype, ends = DTYPES[key[2]], np.cumsum([math.prod(shape) for shape, *_ in parts])
        if codec > 3:
            flat = rans(data, dtype, parts, arrays, codec)
        else:
            raw = np.frombuffer(inflate(codec, data, ends[-1] * dtype.itemsize), "u1")
            flat = np.ascontiguousarray(raw.reshape(dtype.itemsize, -1).T).view(dtype)[:, 0]
        arrays[key] = [a.reshape(part[0]) for a, part in zip(np.split(flat, ends[:-1]), parts)][::-1]
    packed = assemble(manifest, lambda key, *_: arrays[key] and arrays[key].pop())
    tensors, digest = {}, hashlib.sha256()
    for name, array in sorted(packed.items()):
        if type(array) is tuple:
            digest.update(f"{name}\0{array[0].shape}\0".encode() + array[0].astype("<i2").tobytes())
            tensors[name] = dequantize(*array)
        else:
            tensors[name] = (array.astype("<u4") << 16).view("<f4") if array.dtype == "<u2" else array.astype("<f4")
    need(digest.hexdigest() == manifest["symbols_sha256"], "wrong sha256 of symbols")
    for name in [name[:-4] for name in packed if name.endswith(".lqA")]:
        left, right = tensors.pop(name + ".lqA"), tensors.pop(name + ".lqB")
        need(right.ndim == 2 and left.shape[:-1] + right.shape[1:] == tensors[name].shape, "bad low rank")
        tensors[name] = tensors[name] + left @ right
    return manifest, tensors, packed


def lay_out(manifest):
    check([manifest["tensors"], manifest["rans"]])
    layout = {(2, label, 0): [(shape,)] for label, shape in enumerate(manifest["rans"])}
    assemble(manifest, lambda key, *part: layout.setdefault(key, []).append(part))
    parts = [(max(2, DTYPES[key[2]].itemsize), key[0] > 2, part[0]) for key in layout for part in layout[key]]
    need(sum(a * math.prod(b) + 256 * sum(b[:m]) for a, m, b in parts) <= MAX_BYTES, "too large")
    return sorted(layout.items())


def check(tree):
    for n in tree:
        check(n) if type(n) is list else need(type(n) is str or (n >= 0 and n.bit_length() < 28), "bad number")


def assemble(manifest, take):
    """All tensors, of what take(key, shape, *coder settings) gives."""
    tensors = {}
    for name, role, table, shape, dtype, *more in manifest["tensors"]:
        if more:
            matrix, trellis, *factors = more
            factors = [(axis, repeat, take((0, axis, form), [n])) for axis, form, repeat, n in factors]
            if table:
                take((2, 3, 0), matrix[:1])
            tensors[name] = take((3, role, dtype), matrix, trellis, table), shape, trellis, factors
        else:
            tensors[name] = take((1, 0, dtype), shape)
    return tensors


def dequantize(symbols, shape, trellis, factors):
    scale, exponent = np.ones((1, 1), "<f4"), np.zeros((1, 1), "<i4")
    for axis, repeat, values in factors:
        values = values[None] if axis == 2 else values.repeat(repeat)[: symbols.size].reshape(symbols.shape)
        if values.dtype.kind == "f":
            scale = scale * values.astype("<f4")
        else:
            exponent = exponent + values
    scale = scale * np.ldexp((2.0 ** (np.arange(8) / 8)).astype("<f4")[exponent & 7], exponent >> 3)
    points, state = symbols.astype("<i4") << len(trellis[:1]), np.zeros(symbols.shape[1], int)
    for row in range(len(symbols) if trellis else 0):
        state *= row % trellis[0] > 0
        points[row] += state & 1
        state = next_state(state, symbols[row], *trellis)
    return (points.astype("<f4") * scale).reshape(shape)


def next_state(state, symbol, _, h0, h1):
    return state >> 1 ^ (state & 1) * h0 ^ (symbol & 1) * h1


def rans(data, dtype, parts, arrays, codec):
    (states,), (classes,), (weights,) = (arrays[2, label, 0] for label in range(3))
    states = arrays.setdefault("states", states.view("<u4")[:, 0].astype(int))
    (contexts, entries), weights, half = weights.shape, weights.astype(int), weights.shape[1] // 2
    need(contexts <= 256, "many contexts")
    ends = ((weights > 0) * MANTISSAS[weights & 7] << (weights >> 3)).cumsum(1)
    freqs = np.diff(4096 * ends // ends[:, -1:], axis=1, prepend=0).ravel()
    starts = np.cumsum(freqs) - freqs & 4095
    table, n = np.arange(len(freqs)).repeat(freqs), np.arange(128)
    log = np.searchsorted(MANTISSAS[n & 7] << (n >> 3) >> 8, np.arange(1 << 16), "right")
    shrink = MANTISSAS[-n & 7] << 8 >> (8 - (64 - n >> 3))
    words, flat, new = np.frombuffer(data, "<u2"), [], codec > 4
    for ((rows, columns), trellis, group), same in groupby(parts):
        levels = np.array([arrays[2, 3, 0].pop() for _ in same], int)
        width = len(levels) * columns
        need(width <= MAX_WIDTH, "wide")
        out, line, path, means = np.zeros((rows, width), dtype), *np.full((3, width), [[0], [0], [1024]])
        base = np.zeros(width, dtype)
        for row in range(rows):
            level, odd = levels[:, row].repeat(columns), path & 1
            context = 2 * classes[group - 1, log[means] + (level & 127)].astype(int) + odd
            for at in range(0, width, len(states)):
                here = context[at : at + len(states)]
                state = states[: len(here)]
                slot = state & 4095
                which = table[(here << 12) + slot]
                state[:] = freqs[which] * (state >> 12) + slot - starts[which]
                low = np.flatnonzero(state < 1 << 16)
                state[low] = state[low] << 16 | words[: len(low)]
                words = words[len(low) :]
                line[at : at + len(here)] = which - here * entries - half
            wild = line == -half
            words, raw = np.split(words, [len(words) - wild.sum()])
            line[wild] = raw.view("<i2")
            size = np.minimum(abs(2 * line + odd) * shrink[level & 127], 65535)
            means += (size - means) >> min(6 + 2 * new, (row + 2 + 30 * new).bit_length() - 1)
            out[row] = line + base * (level < 0)
            base = np.where(new & (level >= 0), base, out[row])
            if trellis:
                path = next_state(path, out[row], *trellis) * ((row + 1) % trellis[0] > 0)
        flat.append(out.reshape(rows, len(levels), columns).swapaxes(0, 1).ravel())
    return np.concatenate(flat)


def inflate(codec, data, size):
    if codec == 0:
        return data
    if codec == 1:
        decoder, raw = brotli.Decompressor(), bytearray()
        for at in range(0, len(data), 16):
            raw += decoder.process(bytes(data[at : at + 16]))
            need(len(raw) <= size, "too long")
        return raw
    decoder = zlib.decompressobj(-15) if codec == 3 else lzma.LZMADecompressor(lzma.FORMAT_ALONE, 1 << 25)
    return decoder.decompress(data, size + 1)
