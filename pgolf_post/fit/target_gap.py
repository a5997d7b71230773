"""The inverse of the budget problem: how many bytes a given loss takes.

The divergence from the unquantized model grows as c² where c is small, so a few builds, by the secant method in
logarithms, find the c whose divergence on training text is the one wanted; what that model takes is the budget.
"""

from __future__ import annotations

import math

import numpy as np

from pgolf_post.base.progress import say
from pgolf_post.calibrate.text import CalibrationSet
from pgolf_post.data import DataFolder
from pgolf_post.errors import SettingsError
from pgolf_post.fit.prepare import Fitter
from pgolf_post.fit.probe import Probe, decoded, probe_text
from pgolf_post.fit.solve import WINDOW_BYTES, Search
from pgolf_post.fit.steps import constant_for

GAP_BUILDS, GAP_CLOSE = 4, 0.03
MOST_POWER = 6.0  # of c, with which the divergence grows


def limit_for_gap(fitter: Fitter, gap_bpb: float, codec: str = "rans") -> int:
    """Return the artifact bytes at which quantizing should cost `gap_bpb`, measured on training text.

    What is measured is the divergence from the unquantized model, which grows as c²; its seconds count as training
    time. Raises SettingsError for a gap that is not positive and finite.
    """
    require_gap(gap_bpb)
    with fitter.clock.step("target gap"):
        return _limit_for_gap(fitter, gap_bpb, codec)


def require_gap(gap_bpb: float) -> None:
    """Raise SettingsError for a gap that no number of bytes has."""
    if not 0 < gap_bpb < math.inf:
        raise SettingsError(f"a target gap of {gap_bpb:g} bpb: it must be positive and finite")


def _limit_for_gap(fitter: Fitter, gap_bpb: float, codec: str) -> int:
    text = probe_text(fitter.view, fitter.data, fitter.settings.kappa_tokens, fitter.settings.kappa_seed)
    wanted = gap_bpb * np.log(2) * bytes_per_token(fitter.data, text)
    search = Search(fitter.builder, fitter.kappa, codec)
    if not fitter.builder.matrices:
        return search.packed_bytes(fitter.builder.model({}))
    probe = Probe(fitter.view, text)
    constant, power = constant_for(fitter.builder.num_weights, wanted), 2.0
    before: tuple[float, float] | None = None  # c and its divergence
    for _ in range(GAP_BUILDS):
        model = fitter.builder.model(fitter.builder.quantize(search.constants(constant)))
        measured = probe.divergence(decoded(model.quantized))
        spread = f"{measured.mean:.5f} ± {2 * measured.error:.5f}"
        say(f"c {constant:.3e}: {spread} nats/token on training text, {wanted:.5f} wanted")
        if abs(measured.mean / wanted - 1) <= GAP_CLOSE or measured.mean <= 0:
            break
        if before is not None and before[0] != constant:
            slope = math.log(measured.mean / before[1]) / math.log(constant / before[0])
            power = min(max(slope, 1.0), MOST_POWER)
        before = constant, measured.mean
        constant *= (wanted / measured.mean) ** (1 / power)
    return search.packed_bytes(model) + WINDOW_BYTES // 2


def bytes_per_token(data: DataFolder, text: CalibrationSet) -> float:
    """Return the mean bytes of a text's targets: what turns bits per token into bits per byte."""
    before, after = text.tokens[:, :-1].ravel(), text.tokens[:, 1:].ravel()
    return float(data.byte_table.count(before, after).mean())
