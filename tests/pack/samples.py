"""A model small enough to be attacked a thousand times, with everything that the format can hold."""

from __future__ import annotations

import numpy as np

from pgolf_post.quantize.gptq.trellis import Trellis
from pgolf_post.quantize.tensor import QuantizedModel, QuantizedTensor, ScaleFactor


def sample_model(seed: int = 0) -> QuantizedModel:
    """A few hundred weights in three roles, with a trellis, a low-rank pair and control tensors."""
    rng = np.random.default_rng(seed)
    quantized = {}
    for name in [f"blocks.{i}.{part}.weight" for i in range(3) for part in ("attn.q", "mlp.fc")] + ["tok_emb.weight"]:
        symbols = np.clip(np.rint(rng.normal(0, 3, (12, 8))), -31, 31).astype(np.int8)
        factors = [ScaleFactor("row", rng.uniform(0.01, 0.02, 12).astype(np.float16))]
        factors.append(ScaleFactor("column", rng.integers(-9, 9, 8).astype(np.int8)))
        trellis = Trellis(8, 5) if "mlp" in name else None
        quantized[name] = QuantizedTensor(name, symbols, tuple(factors), (12, 8), trellis)
    for suffix, shape in ((".lqA", (12, 2)), (".lqB", (2, 8))):
        name, symbols = f"tok_emb.weight{suffix}", rng.integers(-400, 400, shape).astype(np.int16)
        quantized[name] = QuantizedTensor(name, symbols, (ScaleFactor("tensor", np.array([-80], np.int8)),), shape)
    passthrough = {f"blocks.{i}.gain": rng.normal(size=4).astype(np.float16) for i in range(3)}
    return QuantizedModel({"family": "golf_gpt", "model": {"num_layers": 3}}, {"view": "raw"}, quantized, passthrough)
