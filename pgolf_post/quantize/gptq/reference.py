"""GPTQ in plain loops: what the compiled kernels, torch and numpy must compute, symbol for symbol.

A matrix W (out, in) is rounded column by column. Errors are not independent: with the inputs' second moment
H = F·diag(ℓ²)·Fᵀ (F upper triangular, ones on its diagonal), column j should be rounded from where the errors of the
columns before it want it, w_j + Σ_k<j F_kj·e_k, and not from w_j.

    columns  0    1    2   …          scalar_grid   each weight to the nearest multiple of its step
    row 0    ●──► ●──► ○              trellis       each column along the cheapest path down its rows
    row 1    ●──► ●──► ○              coupled       errors go into the rows below, too:  ●
    row 2    ●──► ●──► ○                            e of row k adds G_ki·e to row i      ▼
                                                                                         ○
The functions take columns in the order of their visit. They are slow, and the oracle of every kernel's test.

Arithmetic is part of the definition, for symbols depend on it: float32, in the order written here. Ties of a rounding
go to the even integer. Of two equally cheap branches into a state that of bit 0 survives; of equally cheap ends the
lowest state wins. One thing is left open: beyond 32 columns, the driver adds up Σ_k F_kj·e_k by matrix products, in an
order that is the library's. So a symbol may differ where its target lies within float32 rounding of a tie.

Sources: Frantar et al. 2022 (arXiv 2210.17323), in the LDLQ form of arXiv 2307.13304; the trellis is trellis.py's, its
search Viterbi's; both sides as in YAQA (arXiv 2505.22988); survivors that carry their own feedback as in Raheli et
al. 1995.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pgolf_post.quantize.gptq.trellis import Trellis, next_states

F = np.float32
Array = np.ndarray


def scalar_grid(
    weight: Array,  # (out, in) float32, as all of these
    feedback: Array,  # (in, in) F
    steps: Array,  # (out, in) Δ
    largest: int,  # symbols stay within ±largest
) -> Array:  # (out, in) int symbols
    """Round every weight to the nearest grid point: n = rint((w + Σ F·e) / Δ), and its error is e = w - n·Δ.

    2×2: W = [[.6, .9], [1.2, 1.8]], F_01 = .9, Δ = [[1, ½], [2, 1]].
    Row 0: .6/1 → 1, e = -.4; then .9 - .9·.4 = .54, .54/½ = 1.08 → 1, where rounding alone gives 1.8 → 2.
    Row 1 is row 0 doubled, steps and all. Symbols [[1, 1], [1, 1]].
    """
    rows, columns = weight.shape
    symbols, errors = np.zeros((rows, columns), int), np.zeros((rows, columns), F)
    for j in range(columns):
        for i in range(rows):
            target = weight[i, j] + _correction(errors, feedback, i, j)
            symbols[i, j] = _clip(np.rint(target / steps[i, j]), largest)
            errors[i, j] = weight[i, j] - F(symbols[i, j]) * steps[i, j]
    return symbols


def trellis(
    weight: Array,  # (out, in) float32, as all of these
    feedback: Array,  # (in, in) F
    steps: Array,  # (out, in), of the union grid: Δ/2
    largest: int,  # symbols stay within ±largest
    code: Trellis,
) -> Array:  # (out, in) int symbols
    """Round every column along the path of least Σ (u - n)², u = (w + Σ F·e) / step; the state restarts in every lane.

    2×2, four states: W = [[.9, 2.2], [1.1, 2.5]], F_01 = .9, steps 1. From state 0 a path may use even points: a
    multiple of 4 leads to state 0, the others to state 1, where points are odd.
    Column 0: (0, 2) costs .81 + .81, (2, 1) costs 1.21 + .01 and wins: symbols (1, 0), errors (-1.1, .1).
    Column 1 is to become 2.2 - .99 = 1.21 and 2.5 + .09 = 2.59. (0, 2) costs 1.46 + .35, (2, 3) costs .62 + .17 and
    wins: symbols (1, 1). Together [[1, 1], [0, 1]].
    """
    rows, columns = weight.shape
    symbols, errors = np.zeros((rows, columns), int), np.zeros((rows, columns), F)
    for j in range(columns):
        for start in range(0, rows, code.lane_rows):
            lane = range(start, min(start + code.lane_rows, rows))
            targets = [(weight[i, j] + _correction(errors, feedback, i, j)) / steps[i, j] for i in lane]
            for i, point, symbol in zip(lane, *_cheapest_path(targets, code, largest), strict=True):
                symbols[i, j] = symbol
                errors[i, j] = weight[i, j] - point * steps[i, j]
    return symbols


def coupled(
    weight: Array,  # (out, in) float32, as all of these
    feedback: Array,  # (in, in) F of the inputs
    row_feedback: Array,  # (out, out) G of the outputs: upper triangular, ones on its diagonal
    steps: Array,  # (out, in), of the union grid where there is a trellis
    largest: int,  # symbols stay within ±largest
    code: Trellis | None = None,
) -> Array:  # (out, in) int symbols
    """Round with feedback from both sides: row i starts from w + Σ_k<j F_kj·R_ik + Σ_k<i G_ki·E_kj.

    E = W - Ŵ is a weight's error, R_i = E_i + Σ_k<i G_ki·E_k what is left of it once the rows below have adapted.
    G's entries above the diagonal are 16-bit integers times a scale per row k.

    2×2, scalar: W all .6, F_01 = .9, G_01 = .5, steps 1. Column 0: .6 → 1, E = -.4; then .6 - .5·.4 = .4 → 0, E = .6.
    R = (-.4, .6 - .2 = .4). Column 1: .6 - .9·.4 = .24 → 0, E = .6; then .6 + .9·.4 + .5·.6 = 1.26 → 1.
    Symbols [[1, 0], [0, 1]].

    2×2, four states: W = [[.9, 2.2], [1.1, 2.5]], F_01 = .9, G_01 = .5, steps 1. A path's errors move its targets.
    Column 0: after 0 (E = .9) row 1 is to become 1.55, and 2 costs .81 + .20; after 2 (E = -1.1) it is .55, and 1 costs
    1.21 + .20. (0, 2) wins: symbols (0, 1), E = (.9, -.9), R = (.9, -.45).
    Column 1: row 0 is to become 3.01. After 4 (E = -1.8) row 1 is 2.5 - .405 - .9 = 1.195, and 2 costs .98 + .65; after
    2 (E = .2) it is 2.195, and 3 costs 1.02 + .65. (4, 2) wins: symbols (2, 1). Together [[0, 2], [1, 1]].
    """
    rows, columns = weight.shape
    symbols, residuals = np.zeros((rows, columns), int), np.zeros((rows, columns), F)
    pulls = RowPulls(row_feedback)
    for j in range(columns):
        corrections = [_correction(residuals, feedback, i, j) for i in range(rows)]
        column = Column(weight[:, j], corrections, steps[:, j], pulls, largest)
        errors = column.to_scalar_grid(symbols[:, j]) if code is None else column.to_trellis(symbols[:, j], code)
        residuals[:, j] = errors + column.shift
    return symbols


def diagonals(
    weight: Array,  # (out, in) float32, as all of these
    feedback: Array,  # (in, in) F of the inputs
    row_feedback: Array | None,  # (out, out) G of the outputs; None: rows are not coupled
    steps: Array,  # (out, in), of the union grid
    largest: int,  # symbols stay within ±largest
    code: Trellis,
) -> Array:  # (out, in) int symbols
    """Round with feedback from both sides, paths running along anti-diagonals from (i, j) to (i + 1, j - 1).

    Targets are those of `coupled`, V for R: w + Σ_l<j F_lj·V_il + Σ_k<i G_ki·E_kj. No error of an anti-diagonal moves
    a target of the same one, so each is searched as `trellis` searches a column.

    2×2, four states: W = [[.9, 2.2], [1.1, 2.5]], F_01 = .9, G_01 = .5, steps 1. (0, 0): .9 → 0 (.81; 2 costs 1.21),
    E = V = .9. Then (0, 1) is to become 2.2 + .9·.9 = 3.01 and (1, 0) 1.1 + .5·.9 = 1.55. From state 0 (2, 1) costs
    .98 + .30, (4, 2) .98 + .20 and wins: E_01 = -1.8; E_10 = 1.1 - 2 = -.9, V_10 = -.9 + .45 = -.45.
    (1, 1), a path of its own: 2.5 - .9·.45 - .5·1.8 = 1.195 → 2. Symbols m = (n - z0)/2: [[0, 2], [1, 1]].
    """
    rows, columns = weight.shape
    symbols = np.zeros((rows, columns), int)
    errors, residuals = np.zeros((rows, columns), F), np.zeros((rows, columns), F)

    def pull(i: int, j: int) -> np.float32:
        total = F(0)
        for k in range(i if row_feedback is not None else 0):
            total = total + row_feedback[k, i] * errors[k, j]  # type: ignore[index]
        return total

    for d in range(rows + columns - 1):
        places = [(i, d - i) for i in range(max(0, d - columns + 1), min(rows, d + 1))]
        targets = [
            (weight[i, j] + _correction(residuals, feedback, i, j) + pull(i, j)) / steps[i, j] for i, j in places
        ]
        for (i, j), point, symbol in zip(places, *_cheapest_path(targets, code, largest), strict=True):
            symbols[i, j] = symbol
            errors[i, j] = weight[i, j] - point * steps[i, j]
            residuals[i, j] = errors[i, j] + pull(i, j)
    return symbols


def _correction(errors: Array, feedback: Array, i: int, j: int) -> np.float32:
    """Return Σ_k<j F_kj·e_ik, added up in the order of the columns."""
    total = F(0)
    for k in range(j):
        total = total + feedback[k, j] * errors[i, k]
    return total


def _clip(value: np.float32, largest: int) -> int:
    return max(-largest, min(largest, int(value)))


# ---- A trellis path ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Path:
    """The cheapest way into a state."""

    cost: np.float32
    points: tuple[np.float32, ...] = ()  # n of each row so far
    symbols: tuple[int, ...] = ()  # m = (n - z0) / 2
    states: tuple[int, ...] = ()  # after each row
    pending: tuple[np.float32, ...] = ()  # coupled rows: what its last errors ask of the next rows


def _extended(path: Path, state: int, bit: int, target: np.float32, largest: int) -> Path:
    """Return a path one row longer: by the nearest n = z0 + 2·bit (mod 4) whose symbol is within ±largest."""
    coset = (state & 1) + 2 * bit
    multiple = np.rint((target - F(coset)) * F(0.25))
    least, greatest = np.ceil((-largest - bit) / 2), np.floor((largest - bit) / 2)
    point = F(min(max(multiple, least), greatest)) * F(4) + F(coset)
    off = target - point
    symbol = int(point - (state & 1)) // 2
    return Path(path.cost + off * off, (*path.points, point), (*path.symbols, symbol), path.states, path.pending)


def _step(paths: dict[int, Path], targets: dict[int, np.float32], states: int, largest: int) -> dict[int, Path]:
    """Return the survivors after one more row: state → the cheapest path into it; bit 0 first, so that it wins ties."""
    table, survivors = next_states(states), dict[int, Path]()
    for bit in (0, 1):
        for state, path in paths.items():
            longer = _extended(path, state, bit, targets[state], largest)
            into = int(table[state, bit])
            if into not in survivors or longer.cost < survivors[into].cost:
                survivors[into] = Path(
                    longer.cost, longer.points, longer.symbols, (*longer.states, into), longer.pending
                )
    return survivors


def _cheapest(paths: dict[int, Path]) -> Path:
    """Return the cheapest path; of equally cheap ones, that in the lowest state."""
    return paths[min(paths, key=lambda state: (paths[state].cost, state))]


def _cheapest_path(
    targets: list[np.float32], code: Trellis, largest: int
) -> tuple[tuple[np.float32, ...], tuple[int, ...]]:
    """Return the points and symbols of one lane (Viterbi)."""
    paths = {0: Path(F(0))}
    for target in targets:
        paths = _step(paths, dict.fromkeys(paths, target), code.states, largest)
    best = _cheapest(paths)
    return best.points, best.symbols


# ---- Coupled rows --------------------------------------------------------------------------------------------------


class RowPulls:
    """G above its diagonal: integers within ±32767 times one float32 scale per row."""

    def __init__(self, row_feedback: Array) -> None:
        self.scales, self.numbers = [], []
        for k, row in enumerate(row_feedback):
            above = row[k + 1 :]
            scale = max(np.abs(above).max(initial=0) / F(32767), np.finfo(F).tiny)
            self.scales.append(F(scale))
            self.numbers.append({k + 1 + place: F(np.rint(value / scale)) for place, value in enumerate(above)})

    def pull(self, k: int, i: int, error: np.float32) -> np.float32:
        """Return what the error of row k asks of row i below it."""
        return self.numbers[k][i] * (error * self.scales[k])


class Column:
    """One column whose rows are coupled. `shift` grows: what settled rows ask of the rows below them."""

    def __init__(
        self, weight: Array, corrections: list[np.float32], steps: Array, pulls: RowPulls, largest: int
    ) -> None:
        self.weight, self.corrections, self.steps, self.pulls, self.largest = weight, corrections, steps, pulls, largest
        self.shift = np.zeros(len(weight), F)

    def to_scalar_grid(self, symbols: Array) -> Array:  # → (out,) errors; symbols are filled in
        """Round row after row."""
        errors = np.zeros(len(self.weight), F)
        for i in range(len(self.weight)):
            target = (self.weight[i] + self.corrections[i] + self.shift[i]) / self.steps[i]
            symbols[i] = _clip(np.rint(target), self.largest)
            errors[i] = self.weight[i] - F(symbols[i]) * self.steps[i]
            self._settle(i, errors[i])
        return errors

    def to_trellis(self, symbols: Array, code: Trellis) -> Array:  # → (out,) errors; symbols are filled in
        """Search lane after lane."""
        rows, errors = len(self.weight), np.zeros(len(self.weight), F)
        for start in range(0, rows, code.lane_rows):
            lane = range(start, min(start + code.lane_rows, rows))
            path, first_unsettled = self._search(lane, code.states)
            for i, point, symbol in zip(lane, path.points, path.symbols, strict=True):
                symbols[i] = symbol
                errors[i] = self.weight[i] - point * self.steps[i]
            for i in range(first_unsettled, lane.stop):
                self._settle(i, errors[i])
        return errors

    def _search(self, lane: range, states: int) -> tuple[Path, int]:  # cheapest path, first row not settled yet
        """Extend survivors row by row; `window` rows up, settle what the cheapest of them says."""
        window = 10 * (states - 1).bit_length()
        paths, settled = {0: Path(F(0))}, lane.start
        for i in lane:
            # Every path has a target of its own; the coupled search multiplies by 1/step.
            base, inverse = self.weight[i] + self.corrections[i] + self.shift[i], F(1) / self.steps[i]
            own = {state: path.pending[0] if path.pending else F(0) for state, path in paths.items()}
            targets = {state: (base + own[state]) * inverse for state in paths}
            paths = _step(paths, targets, states, self.largest)
            paths = {state: self._with_pending(path, i, window) for state, path in paths.items()}
            if i - window >= lane.start:
                # All paths that disagree with the cheapest about the state after that row are dropped.
                at, best = settled - lane.start, _cheapest(paths)
                paths = {state: path for state, path in paths.items() if path.states[at] == best.states[at]}
                self._settle(settled, self.weight[settled] - best.points[at] * self.steps[settled])
                settled += 1
        return _cheapest(paths), settled

    def _with_pending(self, path: Path, i: int, window: int) -> Path:
        """Return the path with what its rows ask of the `window` rows after row i."""
        error = self.weight[i] - path.points[-1] * self.steps[i]
        before = (*path.pending[1:], *[F(0)] * window)
        later = range(i + 1, min(i + 1 + window, len(self.weight)))
        pending = tuple(old + self.pulls.pull(i, row, error) for old, row in zip(before, later, strict=False))
        return Path(path.cost, path.points, path.symbols, path.states, pending)

    def _settle(self, k: int, error: np.float32) -> None:
        """Add to the shifts of the rows below row k what its final error asks of them."""
        for i in range(k + 1, len(self.weight)):
            self.shift[i] = self.shift[i] + self.pulls.pull(k, i, error)
