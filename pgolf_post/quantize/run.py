"""Quantize a whole checkpoint view: plan in hand, tensor by tensor, nothing in place."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pgolf_post.calibrate import Stats
from pgolf_post.checkpoint import View
from pgolf_post.errors import NumericsError
from pgolf_post.families import build_module, get_family
from pgolf_post.plan import QuantizeSettings, TensorPlan, make_plan
from pgolf_post.progress import progress_bar
from pgolf_post.quantize.clip import max_symbol, sdclip_scales
from pgolf_post.quantize.gptq import factorize, gptq, hessian_error
from pgolf_post.quantize.rtn import round_to_nearest
from pgolf_post.quantize.tensor import Factor, QuantizedModel, QuantizedTensor

FP16_MAX = 65504.0


def entropy_bits(symbols: np.ndarray) -> float:
    """Order-0 empirical entropy, bits per symbol."""
    if symbols.size == 0:
        return 0.0
    counts = np.unique(symbols, return_counts=True)[1]
    shares = counts / counts.sum()
    return float(-(shares * np.log2(shares)).sum()) + 0.0  # + 0.0 turns -0.0 into 0.0


def quantize_tensor(plan: TensorPlan, weight: Tensor, stats: Stats, settings: QuantizeSettings) -> QuantizedTensor:
    """Quantize one matrix (out, in) as its plan says; `facts` carry the evidence."""
    started = time.perf_counter()
    weight = weight.float()
    largest = max_symbol(plan.bits)
    facts: dict[str, Any] = {"method": plan.method, "role": plan.role, "bits": plan.bits, "clip": plan.clip}
    if plan.method == "gptq":
        assert plan.site is not None
        hessian = stats.mean_hessian(plan.site)
        scales = sdclip_scales(plan.name, weight, plan.bits, plan.clip, settings.hessian_lambda, hessian.diagonal())
        factor = factorize(plan.name, hessian, settings.damp, settings.act_order)
        symbols = gptq(weight, factor, scales, largest, settings.block_size)
        facts["damp_used"], facts["dead_columns"] = factor.damp, factor.dead_columns
        facts["error"] = hessian_error(weight, symbols * scales[:, None], hessian)
    else:
        scales = sdclip_scales(plan.name, weight, plan.bits, plan.clip)
        symbols = round_to_nearest(weight, scales, largest)
        facts["reason"] = "no site feeds this matrix, so it has no Hessian"
    array = symbols.numpy()
    facts["entropy_bits"] = entropy_bits(array)
    facts["clipped"] = float((np.abs(array) == largest).mean()) if array.size else 0.0
    facts["seconds"] = round(time.perf_counter() - started, 4)
    row_scales = Factor("row", scales.to(torch.float16).numpy())
    return QuantizedTensor(plan.name, array, (row_scales,), tuple(weight.shape), facts=facts)


def keep_tensor(name: str, tensor: Tensor) -> np.ndarray:  # float16
    """A tensor stored as fp16. Raises NumericsError if a value overflows it."""
    largest = float(tensor.abs().max()) if tensor.numel() else 0.0
    if largest > FP16_MAX:
        raise NumericsError(f"{name}: |value| {largest:.4g} does not fit in fp16 (largest {FP16_MAX:g})")
    kept: np.ndarray = tensor.to(torch.float16).numpy()
    return kept


def quantize_view(view: View, stats: Stats, settings: QuantizeSettings) -> QuantizedModel:
    """Quantize every tensor of a view by the plan its family and settings give."""
    family = get_family(view.config["family"])
    plan = make_plan(view.tensors, family, family.sites(build_module(view.config)), settings)
    quantized: dict[str, QuantizedTensor] = {}
    passthrough: dict[str, np.ndarray] = {}
    with progress_bar("quantizing", len(plan)) as advance:
        for row in plan:
            tensor = view.tensors[row.name]
            if row.method == "keep":
                passthrough[row.name] = keep_tensor(row.name, tensor)
            else:
                quantized[row.name] = quantize_tensor(row, tensor, stats, settings)
            advance(1, note=row.name)
    lineage = {"checkpoint_id": view.id[:12], "stats_id": stats.id[:12]}
    return QuantizedModel(view.config, lineage, quantized, passthrough)
