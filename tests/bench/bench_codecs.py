"""The size law and the speed of codecs: a real checkpoint's symbols, and symbols of the record model's shapes.

Baseline of every ratio: brotli at quality 11, in the same run. The real symbols come from any artifact of a trained
model, named on the command line; random ones say nothing about size beyond their own entropy.

    python -m tests.bench.bench_codecs [ARTIFACT]
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np

from pgolf_post.cli.compress import show
from pgolf_post.pack.artifact import read_artifact, unpack
from pgolf_post.pack.compare import compare
from pgolf_post.pack.container import PackSettings, pack
from pgolf_post.pack.predict import predict_bytes
from pgolf_post.progress import print_table, say
from pgolf_post.quantize.tensor import Factor, QuantizedModel, QuantizedTensor

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
        factors = (Factor("row", rng.uniform(0.01, 0.02, shape[0]).astype(np.float16)),)
        quantized[name] = QuantizedTensor(name, symbols, factors, shape)
    return QuantizedModel({}, {}, quantized, {})


def speed() -> None:
    """Processor and wall seconds for 36M symbols."""
    model = record_symbols()
    num_weights = sum(tensor.symbols.size for tensor in model.quantized.values())
    rows: list[tuple[str, ...]] = []
    baseline = 0.0
    for codec in ("brotli", "rans"):
        wall, cpu = time.perf_counter(), time.process_time()
        data = pack(model, PackSettings(codec=codec))
        encode_wall, encode_cpu = time.perf_counter() - wall, time.process_time() - cpu
        wall, cpu = time.perf_counter(), time.process_time()
        unpack(data)
        decode_wall, decode_cpu = time.perf_counter() - wall, time.process_time() - cpu
        baseline = baseline or encode_cpu
        seconds = (encode_wall, encode_cpu, baseline / encode_cpu, decode_wall, decode_cpu)
        rows.append((codec, f"{len(data):,}", *(f"{value:.2f}" for value in seconds)))
    header = ("codec", "bytes", "encode wall s", "encode cpu s", "× brotli", "decode wall s", "decode cpu s")
    print_table(f"{num_weights:,} random symbols of the record model's shapes", header, rows)
    started = time.process_time()
    predicted = predict_bytes(model)
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
