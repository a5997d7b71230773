"""The size law and the speed of codecs: a real checkpoint's symbols, and symbols of the record model's shapes.

Baseline of every ratio: brotli at quality 11, in the same run. The real symbols come from any artifact of a trained
model, named on the command line; random ones say nothing about size beyond their own entropy.

    python -m benchmarks.bench_codecs [ARTIFACT]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np

from pgolf_post.base import numba as compiled
from pgolf_post.base.progress import print_table, say
from pgolf_post.pack.artifact import read_artifact, unpack
from pgolf_post.pack.container import PackSettings, pack
from pgolf_post.pack.report.compare import compare, show
from pgolf_post.pack.report.predict import SizePredictor
from pgolf_post.quantize.gptq.trellis import Trellis
from pgolf_post.quantize.tensor import QuantizedModel, QuantizedTensor, ScaleFactor

RECORD_SHAPES = {  # (rows, columns), blocks
    "attn.q": ((512, 512), 11),
    "attn.k": ((256, 512), 11),
    "attn.v": ((256, 512), 11),
    "attn.proj": ((512, 512), 11),
    "mlp.fc": ((2048, 512), 11),
    "mlp.proj": ((512, 2048), 11),
}
DEVIATION, COLUMN_SPREAD = 2.7, 0.15


def record_symbols(seed: int = 0) -> QuantizedModel:
    """36M Gaussian symbols in the record model's shapes, columns of slightly different deviation."""
    rng = np.random.default_rng(seed)
    shapes = {f"blocks.{i}.{part}.weight": shape for part, (shape, n) in RECORD_SHAPES.items() for i in range(n)}
    quantized = {}
    for name, shape in {**shapes, "tok_emb.weight": (8192, 512)}.items():
        deviation = DEVIATION * np.exp(COLUMN_SPREAD * rng.standard_normal(shape[1], np.float32))
        symbols = np.rint(rng.standard_normal(shape, np.float32) * deviation).astype(np.int8)
        factors = (ScaleFactor("row", rng.uniform(0.01, 0.02, shape[0]).astype(np.float16)),)
        quantized[name] = QuantizedTensor(name, symbols, factors, shape)
    return QuantizedModel({}, {}, quantized, {})


def with_trellis(model: QuantizedModel, seed: int = 1) -> QuantizedModel:
    """The same symbols as points of a trellis of 64 states, with integer factors as `fit` writes them."""
    rng = np.random.default_rng(seed)
    quantized = {}
    for name, tensor in model.quantized.items():
        rows, columns = (rng.integers(-6, 7, size).astype(np.int8) for size in tensor.symbols.shape)
        factors = (
            ScaleFactor("tensor", np.full(1, 0.01, np.float16)),
            ScaleFactor("row", rows),
            ScaleFactor("column", columns),
        )
        quantized[name] = replace(tensor, trellis=Trellis(64, 512), factors=factors)
    return replace(model, quantized=quantized)


def small(model: QuantizedModel) -> QuantizedModel:
    """One of its tensors."""
    return replace(model, quantized=dict([next(iter(model.quantized.items()))]))


@contextmanager
def numpy_alone() -> Iterator[None]:
    """As where numba is not installed."""
    with mock.patch.object(compiled, "has_numba", return_value=False):
        yield


def timed(model: QuantizedModel, codec: str) -> tuple[int, float, float, float, float]:
    """Bytes, and wall and processor seconds to encode and to decode."""
    wall, cpu = time.perf_counter(), time.process_time()
    data = pack(model, PackSettings(codec=codec))
    encoded = time.perf_counter() - wall, time.process_time() - cpu
    wall, cpu = time.perf_counter(), time.process_time()
    unpack(data)
    return len(data), *encoded, time.perf_counter() - wall, time.process_time() - cpu


def speed() -> None:
    """Processor and wall seconds for 36M symbols."""
    model = record_symbols()
    pack(small(model))  # compiles what is not compiled yet
    num_weights = sum(tensor.symbols.size for tensor in model.quantized.values())
    trials = {"brotli": (model, "brotli"), "rans": (model, "rans"), "rans, trellis": (with_trellis(model), "rans")}
    rows: list[tuple[str, ...]] = []
    baseline = 0.0
    for name, trial in trials.items():
        contexts = {"": nullcontext()} if name == "brotli" else {", numpy alone": numpy_alone(), "": nullcontext()}
        for how, context in contexts.items():
            with context:
                found = timed(*trial)
            baseline = baseline or found[2]
            ratio = f"{baseline / found[2]:.1f}"
            cells = [f"{value:.2f}" for value in found[1:]]
            rows.append((name + how, f"{found[0]:,}", *cells[:2], ratio, *cells[2:]))
    header = ("codec", "bytes", "encode wall s", "encode cpu s", "× brotli", "decode wall s", "decode cpu s")
    print_table(f"{num_weights:,} random symbols of the record model's shapes", header, rows)
    started = time.process_time()
    predicted = SizePredictor().predict_bytes(model)
    say(f"predicted {predicted:,} bytes for rans in {time.process_time() - started:.2f} processor seconds")


def main() -> None:
    for name in sys.argv[1:]:
        found = compare(read_artifact(Path(name)).model, ["all"])
        show(found)
        sizes = {row.codec: row.artifact_bytes for row in found.rows}
        ratios = ", ".join(f"{codec} {sizes['rans'] / size:.4f}" for codec, size in sizes.items())
        say(f"artifact bytes of rans relative to: {ratios}")
    speed()


if __name__ == "__main__":
    main()
