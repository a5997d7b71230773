"""One step of the Viterbi search in vectors: the numbers and decisions of the definition, for every trellis."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("numba")

from pgolf_post.base.numba import jit
from pgolf_post.quantize.gptq.survivors import step, width_of
from pgolf_post.quantize.gptq.trellis import POLYNOMIALS
from pgolf_post.quantize.gptq.viterbi import predecessors

F = np.float32


@jit
def walk(cost, decisions, metrics, registers):  # type: ignore[no-untyped-def]
    for place in range(len(metrics)):
        step(
            cost,
            decisions,
            place,
            metrics[place, 0],
            metrics[place, 1],
            metrics[place, 2],
            metrics[place, 3],
            registers,
        )


@pytest.mark.parametrize("states", POLYNOMIALS)
def test_the_cheaper_of_two_branches_survives_in_every_state(states: int) -> None:
    """Costs are multiples of ¼, so that equally cheap branches are common: of those the one of bit 0 survives."""
    length, came_from = 40, predecessors(states)
    metrics = (np.random.default_rng(states).integers(0, 8, (length, 4)) / 4).astype(F)
    cost = np.where(np.arange(states) == 0, F(0), F(np.inf))
    found, width = cost.copy(), width_of(states)
    packed = np.zeros((length, states // width), np.uint8)
    walk(found, packed, metrics, (0,) * (states.bit_length() - 1))
    bits = np.unpackbits(packed[:, :, None], axis=2, bitorder="little")[:, :, :width].reshape(length, states)
    for place, metric in enumerate(metrics):
        zero, one = (cost[came_from[:, bit]] + metric[(came_from[:, bit] & 1) + 2 * bit] for bit in (0, 1))
        assert np.array_equal(bits[place].astype(bool), one < zero), place
        cost = np.where(one < zero, one, zero)
    assert np.array_equal(found, cost)
