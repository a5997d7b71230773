"""Memory of a calibration: an estimate before work starts, and a refusal if it exceeds what is free.

Sums are held in float64 until they are written; the rest is the activations of one batch. Without a backward pass a few
layers' activations exist at a time. With one, the bytes that autograd keeps are measured on a short window and scaled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pgolf_post.base.progress import say
from pgolf_post.calibrate.backward import HEAD_TOKENS
from pgolf_post.calibrate.forward import hooks
from pgolf_post.errors import PgolfError
from pgolf_post.families import Lookup, Site

LIVE_INPUTS = 8  # activations as wide as the widest input that exist at once in a forward pass
HEAD_COPIES = 10  # logits-sized tensors that exist at once
PROBE_TOKENS = 64
UNKNOWN = 1 << 62  # bytes, if the system does not report its limit
ALLOCATOR = 1.15  # what an allocator holds for each byte of activations; measured on a 4.6M-parameter model
SHARE = 0.9  # of the free memory that may be planned with


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that calibration holds at its peak, not counting the weights."""

    sums_bytes: int
    activation_bytes: int
    largest: str  # the largest matrix, with its shape

    @property
    def peak_bytes(self) -> int:
        return self.sums_bytes + self.activation_bytes


def plan_memory(
    module: Any,  # a LanguageModel, on any device
    sites: Sequence[Site],
    lookups: Sequence[Lookup],
    batch_tokens: int,
    seq_len: int,  # of a window: a model may know no more positions
    fisher: bool,
) -> MemoryPlan:
    """Estimate from the sites' widths and, with a backward pass, from a short forward pass."""
    # every matrix that is summed, with its width
    shapes = {tensor: tuple(module.get_parameter(tensor).shape) for site in sites for tensor in site.tensors}
    widths = {f"hessian of {site.name}": shapes[site.tensors[0]][1] for site in sites}
    if fisher:
        widths |= {f"weighted Hessian of {tensor}": shape[1] for tensor, shape in shapes.items()}
        products = [tensor for site in sites if not site.is_head for tensor in site.tensors]
        widths |= {f"output Hessian of {tensor}": shapes[tensor][0] for tensor in products}
        tables = {lookup.tensor: int(module.get_parameter(lookup.tensor).shape[1]) for lookup in lookups}
        widths |= {f"lookup Hessian of {table}": width for table, width in tables.items()}
    # the sums in float64; beside them a chunk's product and its packed copy when it is written, in float32
    name, widest = max(widths.items(), key=lambda item: item[1])
    sums_bytes = sum(8 * width**2 for width in widths.values()) + 3 * 4 * widest**2
    # activations of one batch; with a backward pass also what autograd keeps, and logits of a piece
    activation_bytes = 4 * LIVE_INPUTS * batch_tokens * widest
    if fisher:
        vocab = max(shapes[tensor][0] for site in sites if site.is_head for tensor in site.tensors)
        kept = saved_bytes_per_token(module, sites, lookups, min(PROBE_TOKENS, seq_len))
        activation_bytes += int(batch_tokens * kept) + 4 * HEAD_COPIES * min(HEAD_TOKENS, batch_tokens) * vocab
    return MemoryPlan(sums_bytes, int(ALLOCATOR * activation_bytes), f"{name}, {widest} × {widest}")


def saved_bytes_per_token(
    module: Any, sites: Sequence[Site], lookups: Sequence[Lookup], length: int = PROBE_TOKENS
) -> float:
    """Return bytes per token that a forward pass keeps for its backward pass: autograd's and the observed inputs."""
    kept: dict[int, Tensor] = {}  # held here, so that no address is used twice

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor
        return tensor

    # run a short window, recording every tensor that autograd saves and every input that a site's hook sees
    device = next(module.parameters()).device
    tokens = torch.ones(1, length, dtype=torch.int64, device=device)
    parameters = {parameter.data_ptr() for parameter in module.parameters()}
    observed = [module.get_submodule(site.module) for site in sites]
    starts = [module.get_submodule(lookup.module) for lookup in lookups]
    handles = [part.register_forward_pre_hook(lambda _, inputs: (keep(inputs[0]), None)[1]) for part in observed]
    handles += [part.register_forward_hook(lambda _, __, rows: rows.detach().requires_grad_()) for part in starts]
    with hooks(handles), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.enable_grad():
        module.hidden(tokens)
    # count each storage once, and no parameters
    sizes = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for address, tensor in kept.items()
        if address not in parameters
    }
    return sum(sizes.values()) / length


def require_memory(plan: MemoryPlan, device: torch.device, processes: int = 1) -> None:
    """Print the estimate. Raises PgolfError if it does not fit in the free memory."""
    free = free_bytes(device)
    needed = plan.peak_bytes * (processes if device.type == "cpu" else 1)
    share = f" in {processes} processes" if processes > 1 and device.type == "cpu" else ""
    say(
        f"memory: about {needed / 2**20:,.0f} MiB at the peak{share} (largest matrix: {plan.largest}), "
        f"{free / 2**20:,.0f} MiB free"
    )
    if needed > SHARE * free:
        raise PgolfError(
            f"calibration needs about {needed:,} bytes{share}: {plan.sums_bytes:,} of sums (largest: {plan.largest}) "
            f"and {plan.activation_bytes:,} of activations; {free:,} are free, of which {SHARE:.0%} may be used",
            hint="fewer processes, a shorter window (--calibration-seq-len), or no --fisher; or free memory and run it "
            "again",
        )


def free_bytes(device: torch.device) -> int:
    """Return the free bytes of a device: a GPU's own, or what Linux and its control group have available."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    meminfo = _numbers(Path("/proc/meminfo"))
    free = meminfo["MemAvailable:"] * 1024 if "MemAvailable:" in meminfo else UNKNOWN
    group = Path("/sys/fs/cgroup")
    limit = _numbers(group / "memory.max", named=False).get("", UNKNOWN)
    used = _numbers(group / "memory.current", named=False).get("", 0)
    reclaimable = _numbers(group / "memory.stat").get("inactive_file", 0)
    return min(free, limit - used + reclaimable)


def _numbers(path: Path, named: bool = True) -> dict[str, int]:
    """Return the numbers of a kernel file by the name before each; empty if there is no such file."""
    if not path.is_file():
        return {}
    lines = [line.split() for line in path.read_text().splitlines()]
    pairs = [(line[0], line[1]) for line in lines if len(line) > 1] if named else [("", lines[0][0])]
    return {name: int(number) for name, number in pairs if number.isdigit()}
