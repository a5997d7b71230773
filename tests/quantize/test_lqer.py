"""LQER: the worked example, full rank leaves no error, and the worst tensors are the ones corrected."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from pgolf_post.errors import SettingsError
from pgolf_post.plan import LqerSettings
from pgolf_post.quantize.lqer import correction, corrections, low_rank
from pgolf_post.quantize.tensor import QuantizedTensor, ScaleFactor, add_low_rank
from pgolf_post.settings import parse_settings


def random(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def rounded(name: str, weight: Tensor, step: float) -> QuantizedTensor:
    symbols = (weight / step).round().to(torch.int8).numpy()
    return QuantizedTensor(name, symbols, (ScaleFactor("tensor", np.array([step], np.float16)),), tuple(weight.shape))


def test_the_worked_example_of_the_docstring() -> None:
    error = torch.tensor([[2.0, 1.0], [4.0, 2.0]])
    a, b = low_rank(error, 1)
    assert float(a.norm()) == pytest.approx(5.0)
    assert abs(float(b[0, 0])) == pytest.approx(2 / math.sqrt(5))
    torch.testing.assert_close(a @ b, error)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (1, 5), (4, 4)])
def test_full_rank_leaves_no_error(shape: tuple[int, int]) -> None:
    error = random(*shape)
    a, b = low_rank(error, 100)
    torch.testing.assert_close(a @ b, error, rtol=0, atol=1e-6)


@pytest.mark.parametrize("asymmetric", [True, False])
def test_quantized_factors_take_back_most_of_a_low_rank_error(asymmetric: bool) -> None:
    error = random(30, 4) @ random(4, 40, 1) + 0.01 * random(30, 40, 2)
    a, b = correction("w", error, LqerSettings(rank=4, asymmetric=asymmetric))
    left = error - torch.from_numpy(a.dequantize() @ b.dequantize())
    assert float(left.norm()) < (0.7 if asymmetric else 0.3) * float(error.norm())
    low, high = (-2, 1) if asymmetric else (-7, 7)
    assert low <= a.symbols.min() <= a.symbols.max() <= high


@pytest.mark.parametrize("asymmetric", [True, False])
def test_errors_beyond_fp16_are_corrected_alike(asymmetric: bool) -> None:
    """A power of two beside the factors takes what fp16 has no room for."""
    error, settings = random(30, 4) @ random(4, 40, 1), LqerSettings(rank=4, asymmetric=asymmetric)
    plain, large = correction("w", error, settings), correction("w", error * 2.0**30, settings)
    for half, other in zip(plain, large, strict=True):
        assert np.array_equal(half.symbols, other.symbols)
    assert np.array_equal(large[0].dequantize(), plain[0].dequantize() * np.float32(2.0**30))
    assert np.array_equal(large[1].dequantize(), plain[1].dequantize())
    assert len(plain[0].factors) == 1


def test_eight_bits_are_closer_than_three() -> None:
    error = random(20, 20)
    lost = []
    for bits in (3, 8):
        a, b = correction("w", error, LqerSettings(rank=20, asymmetric=False, bits=bits))
        lost.append(float((error - torch.from_numpy(a.dequantize() @ b.dequantize())).norm()))
    assert lost[1] < 0.1 * lost[0]


def test_the_tensors_with_the_largest_error_are_corrected() -> None:
    weights = {name: random(12, 10, seed) for seed, name in enumerate("abc")}
    steps = {"a": 0.1, "b": 0.8, "c": 0.4}
    quantized = {name: rounded(name, weight, steps[name]) for name, weight in weights.items()}
    made = corrections(weights, quantized, LqerSettings(rank=2, top_k=2))
    assert set(made) == {"b.lqA", "b.lqB", "c.lqA", "c.lqB"}
    assert 0 < made["b.lqA"].facts["energy_restored"] < 1
    restored = add_low_rank({name: tensor.dequantize() for name, tensor in {**quantized, **made}.items()})
    assert set(restored) == set(weights)
    before = float((weights["b"] - torch.from_numpy(quantized["b"].dequantize())).norm())
    assert float((weights["b"] - torch.from_numpy(restored["b"])).norm()) < before


def test_settings_that_cannot_act_are_refused() -> None:
    with pytest.raises(SettingsError, match="asymmetric form is int2 and int4"):
        parse_settings(LqerSettings, {"asymmetric": True, "bits": 6}, "plan")
