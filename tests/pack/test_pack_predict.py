"""The size predictor: near the packed bytes, and the same whether it remembers or not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from pgolf_post.pack.container import pack
from pgolf_post.pack.report import predict
from pgolf_post.pack.report.predict import SizePredictor
from pgolf_post.quantize.gptq.driver import gptq
from pgolf_post.quantize.gptq.factorize import LDLFactor
from pgolf_post.quantize.gptq.trellis import DIAGONALS, Trellis
from pgolf_post.quantize.tensor import QuantizedModel, ScaleFactor
from tests.pack.samples import sample_model
from tests.pack.test_pack_rans import gaussian_model

pytestmark = pytest.mark.slow


def floating(model: QuantizedModel) -> QuantizedModel:
    """The model with fp16 scales."""
    scaled = {
        n: replace(t, factors=(ScaleFactor("tensor", np.ones(1, np.float16)),)) for n, t in model.quantized.items()
    }
    return replace(model, quantized=scaled)


def stepped(model: QuantizedModel, eighths: int) -> QuantizedModel:
    """The model under a trellis, with integer factors of the columns and of the rows."""
    rng = np.random.default_rng(eighths)
    tensors = {}
    for name, tensor in model.quantized.items():
        rows, columns = tensor.symbols.shape
        steps = [rng.integers(-eighths, eighths + 1, n).astype(np.int8) for n in (rows, columns)]
        size = np.exp2(-(steps[0][:, None] + steps[1]) / 8)
        symbols = np.rint(rng.normal(0, 2, (rows, columns)) * size).clip(-127, 127).astype(np.int8)
        factors = (ScaleFactor("row", steps[0]), ScaleFactor("column", steps[1]))
        tensors[name] = replace(tensor, symbols=symbols, factors=factors, trellis=Trellis(8, 64))
    return replace(model, quantized=tensors)


@pytest.mark.parametrize("spread", [0.0, 0.3])
@pytest.mark.parametrize("eighths", [None, 0, 6])
def test_prediction_is_within_a_third_of_a_percent(spread: float, eighths: int | None) -> None:
    model = gaussian_model(spread, spread, blocks=4)
    model = floating(model) if eighths is None else stepped(model, eighths)
    assert SizePredictor().predict_bytes(model) == pytest.approx(len(pack(model)), rel=0.003)


def test_paths_along_diagonals_are_predicted_as_well_as_others() -> None:
    """First bits say much at two bits a weight, and a sample of columns alone does not know them."""
    model, shares = gaussian_model(0.3, 0.3, blocks=4), []
    for code in (Trellis(8, 512), Trellis(8, DIAGONALS)):
        tensors, generator = dict(model.quantized), torch.Generator().manual_seed(0)
        for name, tensor in tensors.items():
            rows, columns = tensor.symbols.shape
            factor = LDLFactor(torch.eye(columns), torch.ones(columns), torch.arange(columns), 0.0, 0, torch.float32)
            weight, steps = torch.randn(rows, columns, generator=generator), torch.full((1,), 0.5)
            symbols = gptq(weight, factor, steps, 127, trellis=code).numpy()
            tensors[name] = replace(tensor, symbols=symbols, trellis=code)
        coarse = replace(model, quantized=tensors)
        shares.append(SizePredictor().predict_bytes(coarse) / len(pack(coarse)))
    assert shares[1] == pytest.approx(shares[0], abs=0.002)


def test_what_has_no_table_entry_is_predicted_as_escaped() -> None:
    """Symbols of more than a byte, as small steps make them."""
    symbols = np.random.default_rng(0).normal(0, 600, (512, 256)).astype(np.int16)
    model = gaussian_model(0, 0)
    name = "blocks.0.mlp.fc.weight"
    wide = replace(model, quantized={**model.quantized, name: replace(model.quantized[name], symbols=symbols)})
    assert SizePredictor().predict_bytes(floating(wide)) == pytest.approx(len(pack(floating(wide))), rel=0.01)


def test_a_small_model_with_everything_is_predicted() -> None:
    assert SizePredictor().predict_bytes(sample_model()) == pytest.approx(len(pack(sample_model())), rel=0.25)


def test_remembering_changes_nothing_but_the_time() -> None:
    model, other = gaussian_model(0, 0.2), gaussian_model(0, 0.2, seed=1)
    mixed = replace(model, quantized=model.quantized | dict(list(other.quantized.items())[:2]))
    predictor = SizePredictor()
    first = [predictor.predict_bytes(m) for m in (model, other, mixed)]
    assert [predictor.predict_bytes(m) for m in (mixed, model, other)] == [first[2], first[0], first[1]]
    assert [SizePredictor().predict_bytes(m) for m in (mixed, other, model)] == [first[2], first[1], first[0]]


def test_only_what_changed_is_counted_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, counted = gaussian_model(0, 0.2), list[int]()
    count = predict._count
    monkeypatch.setattr(predict, "_count", lambda tensors: counted.append(len(tensors)) or count(tensors))
    predictor = SizePredictor()
    before = predictor.predict_bytes(model)
    assert sum(counted) == len(model.quantized)
    name = "blocks.1.attn.q.weight"
    symbols = 2 * model.quantized[name].symbols + np.random.default_rng(0).integers(0, 2, (256, 256))
    wider = replace(model.quantized[name], symbols=symbols.astype(np.int8))
    counted.clear()
    after = predictor.predict_bytes(replace(model, quantized={**model.quantized, name: wider}))
    assert counted == [1]
    assert after == pytest.approx(before + wider.symbols.size / 8, rel=0.005)


def test_nothing_is_remembered_outside_the_predictor(monkeypatch: pytest.MonkeyPatch) -> None:
    model, counted = gaussian_model(0, 0.2), list[int]()
    count = predict._count
    monkeypatch.setattr(predict, "_count", lambda tensors: counted.append(len(tensors)) or count(tensors))
    for _ in range(2):
        SizePredictor().predict_bytes(model)
    assert sum(counted) == 2 * len(model.quantized)


def test_what_is_remembered_is_bounded() -> None:
    predictor = SizePredictor(remembered=5)
    predicted = predictor.predict_bytes(gaussian_model(0, 0.2))
    assert len(predictor._memory) == 5
    assert predictor.predict_bytes(gaussian_model(0, 0.2)) == predicted
