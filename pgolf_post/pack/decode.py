"""Decoder of numpy and brotli only."""

import hashlib
import json
import lzma
import struct
import zlib
from itertools import groupby
from math import prod

import brotli
import numpy as np

MAGIC, FRAME = b"PGLF\2", struct.Struct("<BII")
MAX_BYTES, MAX_MANIFEST, MAX_WIDTH = 1 << 27, 1 << 20, 1 << 20
DTYPES = [*map(np.dtype, ("<i1", "<i2", "<f2", "<u2", "<f4"))]
RANS = {4: (6, 2, 0), 5: (8, 32, 0), 7: (7, 128, 64)}  # shift, first rows, rounding
MANTISSAS = np.array([256, 279, 304, 332, 362, 395, 431, 470])


class ArtifactError(ValueError):
    pass


def need(met, message="too large"):
    if not met:
        raise ArtifactError(message)


def decode(data):
    try:
        return build(*read_units(memoryview(data)))
    except Exception as error:
        raise ArtifactError(f"damaged artifact: {error}") from error


def read_units(data):
    need(data[:5] == MAGIC, "no PGLF 2 artifact")
    units, at = [], 5
    while at < len(data):
        codec, size, crc = FRAME.unpack_from(data, at)
        start, at = at + 9, at + 9 + size
        checked = zlib.crc32(data[start:at], zlib.crc32(data[start - 9 : start - 4]))
        need(checked == crc, f"unit {len(units)} is damaged")
        units.append((codec, data[start:at]))
    return units


def build(first, *units):
    manifest, tensors, digest = json.loads(bytes(inflate(*first, MAX_MANIFEST))), {}, hashlib.sha256()
    layout, packed = lay_out(manifest)
    for (key, parts), (codec, data) in zip(sorted(layout.items()), units, strict=True):
        dtype, sizes = DTYPES[key[2]], [prod(part[0]) for part in parts]
        if codec in RANS:
            arrays = rans(data, dtype, parts, layout, codec)
        else:
            raw = np.frombuffer(inflate(codec, data, sum(sizes) * dtype.itemsize), "u1")
            flat = raw.reshape(-1, dtype.itemsize, order="FC"[codec == 6]).tobytes()
            arrays = np.split(np.frombuffer(flat, dtype), np.cumsum(sizes)[:-1])
        for part, array in zip(parts, arrays):
            part[0] = array.reshape(part[0])
    for name, (array, *more) in sorted(packed.items()):
        if more:
            digest.update(f"{name}\0{array.shape}\0".encode() + array.astype("<i2").tobytes())
            tensors[name] = dequantize(array, *more)
        else:
            wide = (array.astype("<u4") << 16).view("<f4") if array.dtype == "<u2" else array
            tensors[name] = np.array(wide, "<f4")
    need(digest.hexdigest() == manifest["symbols_sha256"], "wrong sha256")
    for name in [n[:-4] for n in packed if n.endswith(".lqA")]:
        left, right = tensors.pop(name + ".lqA"), tensors.pop(name + ".lqB")
        need(right.ndim == 2 and left.shape[:-1] + right.shape[1:] == tensors[name].shape)
        tensors[name] += left @ right
    return manifest, tensors, packed


def lay_out(manifest):
    """Parts [shape, ...] by unit and tensor."""
    check([manifest["tensors"], manifest["rans"]])
    layout, packed = {(2, label, 0): [[shape]] for label, shape in enumerate(manifest["rans"])}, {}

    def add(part, *key):
        layout.setdefault(key, []).append(part)
        return part

    for name, role, table, shape, dtype, *more in manifest["tensors"]:
        section, part = 1, [shape]
        if more:
            matrix, trellis, *factors = more
            factors = [(axis, each, add([[n]], 0, axis, form)) for axis, form, each, n in factors]
            section, part = 3, [matrix, trellis, table, factors, table and add([matrix[:1]], 2, 3, 0), shape]
        packed[name] = add(part, section, role, dtype)
    rooms = [(2 << (k[2] > 3)) * prod(p[0]) + 256 * sum(p[0][: k[0] > 2]) for k in layout for p in layout[k]]
    need(sum(rooms) <= MAX_BYTES)
    return layout, packed


def check(tree):
    for n in tree:
        check(n) if type(n) is list else need(type(n) is str or (n >= 0 and n.bit_length() < 28))


def spread(factors, shape, kind):
    """Factors of one kind, as they broadcast."""
    for axis, each, (values,) in factors:
        if values.dtype.kind == kind:
            yield values[None] if axis == 2 else values[np.arange(prod(shape)) // each].reshape(shape)


def dequantize(symbols, trellis, _, factors, scales, shape):
    scale = prod((values.astype("<f4") for values in spread(factors, symbols.shape, "f")), start=np.float32(1))
    exponent = sum(spread(factors, symbols.shape, "i"), np.zeros((1, 1), "<i4"))
    scale = scale * np.ldexp((2.0 ** (np.arange(8) / 8)).astype("<f4")[exponent & 7], exponent >> 3)
    points, state = symbols.astype("<i4") << len(trellis[:1]), np.zeros(symbols.shape[1], int)
    for row in range(len(symbols) * bool(trellis)):
        points[row] += state & 1
        state = next_state(state, symbols[row], row, len(state), trellis)
    return (points.astype("<f4") * scale).reshape(shape)


def next_state(state, symbols, row, width, trellis):
    lane, h0, h1 = trellis
    state = state >> 1 ^ (state & 1) * h0 ^ (symbols & 1) * h1
    if lane:
        return state * ((row + 1) % lane > 0)
    state[:-1] = state[1:]
    state[width - 1 :: width] = 0
    return state


def power(n):
    """2^(8 + n/8)."""
    return MANTISSAS[n & 7] << (n >> 3)


def rans(data, dtype, parts, layout, codec):
    states, classes, weights = (layout[2, label, 0][0][0] for label in range(3))
    states = layout.setdefault("states", states.view("<u4")[:, 0].astype(int))
    need(len(weights) <= 256)
    weights, entries = weights.astype(int), weights.shape[1]
    ends = ((weights > 0) * power(weights)).cumsum(1)
    freqs = np.diff(4096 * ends // ends[:, -1:], prepend=0).ravel()
    starts, symbols = np.cumsum(freqs) - freqs, np.arange(len(freqs)) % entries - entries // 2
    table, n = np.arange(len(freqs)).repeat(freqs), np.arange(128)
    log, shrink = np.searchsorted(power(n) >> 8, np.arange(1 << 16), "right"), power(128 - n) >> 8
    words, (shift, first, half) = np.frombuffer(data, "<u2"), RANS[codec]
    for (shape, trellis, group), some in groupby(parts, lambda part: part[:3]):
        same, (rows, columns) = [*some], shape
        near = np.transpose([part[4][0] for part in same]).repeat(columns, 1)
        steps = [sum(spread(part[3] * (codec > 6), shape, "i"), np.zeros(shape, "<i2")) for part in same]
        scales, width = near - np.concatenate(steps, 1) & 127, len(same) * columns
        need(width <= MAX_WIDTH)
        out, (line, path, base, means) = np.zeros((rows, width), dtype), np.zeros((4, width), "<i4")
        means += 1024
        for row, (scale, alike, now) in enumerate(zip(scales, near < 0, out)):
            odd = path & 1
            context = 2 * classes[group - 1, log[means] + scale].astype(int) + odd
            for at in range(0, width, len(states)):
                here = context[at : at + len(states)]
                state = states[: len(here)]
                slot = (here << 12) + (state & 4095)
                which = table[slot]
                state[:] = freqs[which] * (state >> 12) + slot - starts[which]
                low = np.flatnonzero(state < 1 << 16)
                state[low] = state[low] << 16 | words[: len(low)]
                words = words[len(low) :]
                line[at : at + len(here)] = symbols[which]
            wild = line == symbols[0]
            words, raw = np.split(words, [len(words) - wild.sum()])
            line[wild] = raw.view("<i2")
            size = np.minimum(abs(2 * line + odd) * shrink[scale], 65535)
            means += size - means + half >> min(shift, (row + first).bit_length() - 1)
            now[:] = line + base * alike
            base = np.where(alike, now, base) if codec > 4 else now
            path = next_state(path, now, row, columns, trellis) if trellis else path
        yield from np.split(out, len(same), 1)


def inflate(codec, data, size):
    if codec == 0:
        return data
    if codec == 1:
        decoder, raw = brotli.Decompressor(), bytearray()
        for at in range(0, len(data), 16):
            raw += decoder.process(bytes(data[at : at + 16]))
            need(len(raw) <= size)
        return raw
    decoder = zlib.decompressobj(-15) if codec == 3 else lzma.LZMADecompressor(memlimit=1 << 25)
    return decoder.decompress(data, size + 1)
