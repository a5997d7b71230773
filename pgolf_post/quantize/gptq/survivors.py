"""One weight's step of the Viterbi search, for all states at once in vector registers. Imported only where numba loads.

A loop over states reads the costs of their predecessors here and there, which takes ten times as long as adding and
comparing them. But those places are regular. The predecessors of state t have its highest bit as their first bit z0,
and by branch bit z1 they are 2·(t' ⊕ h0·z0 ⊕ h1·z1) + z0, where t' are t's other bits and h0, h1 the polynomials
without their lowest bit (trellis.py). So the costs of even states, and those of odd ones, are taken apart once; the
rest permutes them by ⊕ with a constant: within a vector a shuffle, between vectors no instruction at all. numba's own
loops do not find that, so the step is written in LLVM's instructions. The same float32 operations as in viterbi.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from pgolf_post.quantize.gptq.trellis import POLYNOMIALS

FLOAT, INDEX, BYTE = ir.FloatType(), ir.IntType(32), ir.IntType(8)


def width_of(states: int) -> int:
    """Return how many states one vector holds, which is also how many decisions one byte holds."""
    return min(8, states // 2)


@intrinsic
def step(  # type: ignore[no-untyped-def]
    typing_context,
    cost,  # (states,) float32, of the cheapest path into a state; replaced
    decisions,  # (length, states / width) uint8; row `place` gets the branch bits of the survivors, lowest state first
    place,
    metric_0, metric_1, metric_2, metric_3,  # float32: what a branch costs, by its coset
    registers,  # a tuple as long as a state has bits: its type tells the compiler the trellis
):  # fmt: skip
    """Extend the cheapest path into every state by one weight; of two equally cheap ones that of bit 0 survives."""
    signature = types.void(cost, decisions, place, metric_0, metric_1, metric_2, metric_3, registers)
    states = 2**registers.count

    def generate(context: Any, builder: Any, signature: Any, arguments: Sequence[Any]) -> Any:
        costs, bits, at, *metrics, _ = arguments
        costs = context.make_array(cost)(context, builder, costs).data
        rows = context.make_array(decisions)(context, builder, bits)
        stride = cgutils.unpack_tuple(builder, rows.strides, 2)[0]
        row = builder.gep(builder.bitcast(rows.data, BYTE.as_pointer()), [builder.mul(at, stride)])
        _emit(builder, costs, row, metrics, states)
        return context.get_dummy_value()

    return signature, generate


def _emit(builder: Any, costs: Any, row: Any, metrics: Sequence[Any], states: int) -> None:
    """Write the instructions of one step of a trellis."""
    width = width_of(states)
    vector = ir.VectorType(FLOAT, width)
    undefined = ir.Constant(vector, ir.Undefined)

    def shuffled(one: Any, other: Any, places: Sequence[int]) -> Any:
        mask = ir.Constant(ir.VectorType(INDEX, len(places)), list(places))
        return builder.shuffle_vector(one, other, mask)

    def moved(vectors: Sequence[Any], number: int, by: int) -> Any:
        """Return vector `number` of the states s ⊕ by."""
        source, within = vectors[number ^ by // width], by % width
        return shuffled(source, undefined, [k ^ within for k in range(width)]) if within else source

    # Costs of all states; those of even ones and of odd ones.
    costs = builder.bitcast(costs, vector.as_pointer())
    before = [builder.load(builder.gep(costs, [INDEX(k)]), align=4) for k in range(states // width)]
    spread = [shuffled(builder.insert_element(undefined, one, INDEX(0)), undefined, [0] * width) for one in metrics]
    for z0 in (0, 1):
        apart = [
            shuffled(low, high, range(z0, 2 * width, 2)) for low, high in zip(before[::2], before[1::2], strict=True)
        ]
        h0, h1 = (polynomial >> 1 for polynomial in POLYNOMIALS[states])
        by = (h0 % (states // 2)) * z0
        for number in range(len(apart)):
            zero = builder.fadd(moved(apart, number, by), spread[z0])
            one = builder.fadd(moved(apart, number, by ^ h1), spread[z0 + 2])
            less = builder.fcmp_ordered("<", one, zero)
            into = z0 * len(apart) + number
            builder.store(builder.select(less, one, zero), builder.gep(costs, [INDEX(into)]), align=4)
            chosen = builder.bitcast(less, ir.IntType(width))
            chosen = chosen if width == BYTE.width else builder.zext(chosen, BYTE)
            builder.store(chosen, builder.gep(row, [INDEX(into)]))
