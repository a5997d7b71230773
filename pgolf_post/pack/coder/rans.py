"""rANS: symbols → words of 16 bits, as close to their contexts' entropy as the frequency tables say.

Range asymmetric numeral systems (Duda, arXiv 1311.2540), interleaved: each lane has a 32-bit state x ≥ 2^16. Coding a
symbol of frequency f, starting at s in its table of 4,096, turns x into 4096·⌊x/f⌋ + x mod f + s, after moving x's low
16 bits out while x ≥ f·2^20. The decoder undoes it from the last symbol to the first, so the encoder walks backwards
and the decoder forwards. A row of a block is coded in vectors of at most `lanes` symbols, one per lane; states last
over all units of an artifact, so that they are stored once, and cost 3 bytes a lane beyond their information.

A unit is its words in the order read, then escaped symbols as int16, the first row's last. `contexts.py` and
`frequency_tables.py` choose the context of each symbol; the decoder is in `decode.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pgolf_post.base.numba import use_compiled
from pgolf_post.pack.coder import contexts
from pgolf_post.pack.coder.contexts import Block
from pgolf_post.pack.coder.frequency_tables import TOTAL, Model, entropy, fit_tables, frequencies
from pgolf_post.pack.coder.row_shifts import with_row_shifts

LOW = 1 << 16  # states stay in [LOW, 2^32)
SYMBOLS_PER_LANE_LOG2 = 16  # 3 bytes per lane are then 0.01 % of 3.5 bits per symbol
MAX_LANES = 4096


@dataclass(frozen=True)
class Coded:
    """Units of symbols as rANS stores them, one per role."""

    streams: tuple[bytes, ...]  # one per role
    model: Model
    states: np.ndarray  # (lanes,) uint32, before the first symbol is read
    row_shifts: tuple[np.ndarray, ...]  # per role: (rows of all its tensors,) uint8

    @property
    def unit_bits(self) -> list[float]:
        """Expected bits of each role's symbols and row shifts; shared tables and states are not counted."""
        shift_bits = [len(shifts) * entropy(np.bincount(shifts)) for shifts in self.row_shifts]
        return [bits + side for bits, side in zip(self.model.coded_bits, shift_bits, strict=True)]


def lane_count(num_symbols: int) -> int:
    """Return the number of lanes: a power of two for which the states cost about 0.02 % of the symbols."""
    wanted = round(np.log2(max(1, num_symbols) / (1 << SYMBOLS_PER_LANE_LOG2)))
    return int(min(max(2 ** max(wanted, 2), 4), MAX_LANES))


def fit(roles: Sequence[Sequence[Block]]) -> tuple[list[list[Block]], Model]:
    """Return blocks with the row shifts that `encode` would use, and its tables with what symbols cost by them."""
    shifted, _, model = _walk(roles)
    return shifted, model


def _walk(
    roles: Sequence[Sequence[Block]],
) -> tuple[list[list[Block]], list[list[tuple[np.ndarray, np.ndarray]]], Model]:
    """Return blocks with their row shifts, every symbol's level and trellis bit, and the model fitted to them."""
    shifted = [with_row_shifts(blocks) for blocks in roles]
    walked = [[contexts.levels_of(block) for block in blocks] for blocks in shifted]
    histograms = [contexts.histogram_of(*both) for both in zip(shifted, walked, strict=True)]
    return shifted, walked, fit_tables(histograms)


def encode(roles: Sequence[Sequence[Block]]) -> Coded:
    """Choose row shifts, contexts and tables for all roles, then code them from the last symbol to the first."""
    shifted, walked, model = _walk(roles)
    states = np.full(lane_count(sum(block.num_symbols for blocks in roles for block in blocks)), LOW, np.int64)
    coder = Coder(frequencies(model.weights), states)
    streams = [
        coder.encode_role(blocks, walks, model.classes[group])
        for blocks, walks, group in reversed(list(zip(shifted, walked, model.group_of, strict=True)))
    ]
    row_shifts = tuple(np.concatenate([block.row_shifts.ravel() for block in blocks]) for blocks in shifted)
    return Coded(tuple(reversed(streams)), model, states.astype(np.uint32), row_shifts)


class Coder:
    """The inverse of `decode.rans`: roles, rows and vectors come in backwards."""

    def __init__(self, freqs: np.ndarray, states: np.ndarray) -> None:
        self.width = freqs.shape[1]
        self.freqs, self.starts = freqs.ravel(), (freqs.cumsum(axis=1) - freqs).ravel()
        self.states = states  # (lanes,) int64, changed in place

    def encode_role(
        self,
        blocks: Sequence[Block],
        walks: Sequence[tuple[np.ndarray, np.ndarray]],
        classes: np.ndarray,  # (LEVELS,)
        compiled: bool | None = None,
    ) -> bytes:
        """Return the unit of one role: words, then escaped symbols."""
        encode_block = self._encode_compiled if use_compiled(compiled) else self._encode_block
        words: list[np.ndarray] = []
        escaped: list[np.ndarray] = []
        for block, walk in reversed(list(zip(blocks, walks, strict=True))):
            levels, odds = walk
            encode_block(block.residuals, levels, odds, classes, words, escaped)
        parts = [part.astype("<u2") for part in reversed(words)] + [part.astype("<i2").view("<u2") for part in escaped]
        return b"".join(part.tobytes() for part in parts)

    def _encode_compiled(
        self,
        symbols: np.ndarray,
        levels: np.ndarray,
        odds: np.ndarray,
        classes: np.ndarray,
        words: list[np.ndarray],
        escaped: list[np.ndarray],
    ) -> None:
        from pgolf_post.pack.coder import kernels

        ours, theirs = np.empty(symbols.size, np.uint16), np.empty(symbols.size, symbols.dtype)
        tables = (classes, self.freqs, self.starts, self.width, TOTAL)
        first, count = kernels.encode(symbols, levels, odds, *tables, self.states, ours, theirs)
        words.append(ours[first:].copy())
        escaped.append(theirs[:count].copy())

    def _encode_block(
        self,
        symbols: np.ndarray,  # (rows, width)
        levels: np.ndarray,  # like symbols
        odds: np.ndarray,
        classes: np.ndarray,  # (LEVELS,)
        words: list[np.ndarray],  # appended to, the last first
        escaped: list[np.ndarray],
    ) -> None:
        """Code a block, the last row first."""
        for row in reversed(range(len(levels))):
            contexts_of_row = 2 * classes[levels[row]].astype(np.int64) + odds[row]
            self._encode_row(symbols[row], contexts_of_row, words, escaped)

    def _encode_row(
        self, symbols: np.ndarray, row_contexts: np.ndarray, words: list[np.ndarray], escaped: list[np.ndarray]
    ) -> None:
        """Code one row in vectors of one symbol per lane, the last vector first."""
        # each symbol's entry in its context's table; 0, the escape, for what lies outside the tables
        entries = symbols.astype(np.int64) + self.width // 2
        entries[(entries < 1) | (entries >= self.width)] = 0
        which = row_contexts * self.width + entries

        # symbols whose own table lacks them are escaped, too; escaped ones follow the words as they are
        wild = self.freqs[which] == 0
        which[wild] = row_contexts[wild] * self.width
        wild |= entries == 0
        if wild.any():
            escaped.append(symbols[wild])

        # push the row, one vector of lanes at a time
        freqs, starts, lanes = self.freqs[which], self.starts[which], len(self.states)
        for at in reversed(range(0, len(symbols), lanes)):
            self._push(freqs[at : at + lanes], starts[at : at + lanes], words)

    def _push(self, freqs: np.ndarray, starts: np.ndarray, words: list[np.ndarray]) -> None:
        """Code one symbol in each of the first lanes. float64 gives ⌊x/f⌋ exactly: x < 2^32, f ≤ 2^12."""
        state = self.states[: len(freqs)]
        full = np.flatnonzero(state >= freqs << 20)
        words.append(state[full] & 0xFFFF)
        state[full] >>= 16
        quotient = (state / freqs).astype(np.int64)
        state += quotient * (TOTAL - freqs) + starts
