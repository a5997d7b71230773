"""A trellis along anti-diagonals: the definition's symbols on every path, its gain, and a decoder that walks alike."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pgolf_post.errors import MismatchError
from pgolf_post.pack import decode
from pgolf_post.pack.artifact import unpack
from pgolf_post.pack.coder import contexts
from pgolf_post.pack.container import PackSettings, pack
from pgolf_post.quantize.gptq import reference
from pgolf_post.quantize.gptq.driver import gptq
from pgolf_post.quantize.gptq.factorize import LDLFactor, factorize
from pgolf_post.quantize.gptq.trellis import DIAGONALS, Trellis, first_bits, grid_points
from pgolf_post.quantize.gptq.viterbi import LARGEST
from pgolf_post.quantize.tensor import QuantizedModel, QuantizedTensor, ScaleFactor
from tests.pack.test_pack_container import assert_same
from tests.quantize.gptq.test_coupled import loss, moments, sloped
from tests.quantize.gptq.test_reference import FACTORS, upper

F = np.float32


def in_order(feedback: torch.Tensor) -> LDLFactor:
    size = len(feedback)
    return LDLFactor(feedback, torch.ones(size), torch.arange(size), 0.0, 0, torch.float32)


def test_the_worked_example() -> None:
    weight, code = np.array([[0.9, 2.2], [1.1, 2.5]], F), Trellis(4, DIAGONALS)
    symbols = reference.diagonals(weight, *FACTORS, np.ones((2, 2), F), 31, code)
    assert symbols.tolist() == [[0, 2], [1, 1]]
    assert grid_points(symbols, code).tolist() == [[0, 4], [2, 2]]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 12),
    columns=st.integers(1, 12),
    seed=st.integers(0, 10_000),
    states=st.sampled_from([4, 8, 64]),
    coupled=st.booleans(),
    largest=st.sampled_from([None, 1, 3, 31]),
)
def test_every_path_gives_the_symbols_of_the_reference(
    rows: int, columns: int, seed: int, states: int, coupled: bool, largest: int | None
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = (16 * torch.randn(rows, columns, generator=generator)).round() / 8  # dyadic: sums are exact, ties common
    shape = [(rows, columns), (rows, 1), (1, columns), (1, 1)][seed % 4]
    steps = 2.0 ** torch.randint(-2, 1, shape, generator=generator)
    feedback, row_feedback = upper(columns, generator, True), upper(rows, generator, True) if coupled else None
    code = Trellis(states, DIAGONALS)
    spread = steps.expand(rows, columns).contiguous().numpy()
    above = None if row_feedback is None else row_feedback.numpy()
    wanted = reference.diagonals(weight.numpy(), feedback.numpy(), above, spread, largest or LARGEST, code)
    for compiled in (True, False):
        symbols = gptq(
            weight, in_order(feedback), steps, largest, trellis=code, row_feedback=row_feedback, compiled=compiled
        )
        assert symbols.tolist() == wanted.tolist(), f"compiled = {compiled}"


@pytest.mark.parametrize(("rows", "columns"), [(1, 300), (300, 1), (270, 67), (65, 290)])
def test_errors_reach_every_weight_beyond_their_tile_and_block(rows: int, columns: int) -> None:
    """E recomputed from the symbols: every target is within the coset spacing of its point, R = GᵀEF."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    inputs = factorize("inputs", moments(columns, 1), 1e-6, act_order=False)
    outputs = factorize("outputs", moments(rows, 2), 1e-6, act_order=False)
    code, steps = Trellis(8, DIAGONALS), sloped(inputs, outputs, 0.15)
    ours, plain = (
        gptq(weight, inputs, steps, None, trellis=code, row_feedback=outputs.feedback, compiled=compiled)
        for compiled in (True, False)
    )
    assert (ours != plain).float().mean() < 0.01  # matrix products of one library, sums of another order
    error = (weight - torch.from_numpy(grid_points(ours.numpy(), code)) * steps).double()
    rest = outputs.feedback.double().T @ error @ inputs.feedback.double() / steps
    assert float(rest.abs().max()) <= 2.01  # half the distance of a state's points, of which there is one every 2 steps


@pytest.mark.parametrize("columns", [48, 200])
def test_it_gains_on_a_scalar_grid_and_on_a_trellis_down_the_columns(columns: int) -> None:
    weight = torch.randn(160, columns, generator=torch.Generator().manual_seed(0))
    inputs = factorize("inputs", moments(columns, 1), 1e-6, act_order=False)
    outputs = factorize("outputs", moments(160, 2), 1e-6, act_order=False)
    steps = sloped(inputs, outputs, 0.3)
    found = {}
    for name, code in {"scalar": None, "down": Trellis(8, 160), "diagonal": Trellis(8, DIAGONALS)}.items():
        finer = steps / 2 if code else steps
        symbols = gptq(weight, inputs, finer, None, trellis=code, row_feedback=outputs.feedback).numpy()
        points = grid_points(symbols, code) if code else symbols
        found[name] = loss(weight - torch.from_numpy(points) * finer)
    assert found["diagonal"] < 0.95 * found["scalar"]
    assert found["diagonal"] < 1.03 * found["down"]


def test_columns_in_another_order_are_refused() -> None:
    factor = LDLFactor(torch.eye(3), torch.ones(3), torch.tensor([2, 0, 1]), 0.0, 0, torch.float32)
    with pytest.raises(MismatchError, match="columns in their own order"):
        gptq(torch.zeros(2, 3), factor, torch.ones(1, 1), None, trellis=Trellis(4, DIAGONALS))


def tensor(name: str, rows: int, columns: int, states: int = 8) -> QuantizedTensor:
    symbols = np.random.default_rng(rows * columns).integers(-5, 6, (rows, columns)).astype(np.int8)
    factor = ScaleFactor("row", np.random.default_rng(rows).integers(-40, -30, rows).astype(np.int8))
    return QuantizedTensor(name, symbols, (factor,), symbols.shape, Trellis(states, DIAGONALS))


@pytest.mark.parametrize("codec", ["rans", "brotli"])
def test_the_decoder_walks_as_the_encoder_did(codec: str) -> None:
    shapes = [(1, 9), (9, 1), (33, 20), (20, 33), (33, 20)]
    tensors = [tensor(f"blocks.{i}.w", *shape) for i, shape in enumerate(shapes)]
    model = QuantizedModel({}, {}, {one.name: one for one in tensors}, {})
    data = pack(model, PackSettings(codec=codec))
    _, arrays, _ = decode.decode(data)
    for one in tensors:
        assert np.array_equal(arrays[one.name], one.dequantize())
    assert_same(unpack(data), model)


def test_contexts_know_the_first_bit() -> None:
    matrices = [tensor("a", 12, 7).symbols, tensor("b", 12, 7, 64).symbols]
    block = contexts.make_block(matrices, Trellis(8, DIAGONALS))
    wanted = np.concatenate([first_bits(one, Trellis(8, DIAGONALS)) for one in matrices], axis=1)
    for compiled in (True, False):
        assert np.array_equal(contexts.levels_of(block, compiled)[1], wanted)
