"""GPUs: how many, how much memory, how fast in fact, and what else runs on them."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from pgolf_post.base.threads import num_threads
from pgolf_post.doctor.findings import Finding, failed, ok, warning
from pgolf_post.doctor.nvidia import query

# Dense bfloat16 rating in TFLOP/s, from the makers' data sheets; a large matrix product reaches some 70 % of it.
RATINGS = {
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "B200": 2250.0,
    "A100": 312.0,
    "L40S": 362.0,
    "4090": 165.0,
}
REACHED = 0.70
SLOW = 0.80  # of what a card of its kind reaches
H100 = RATINGS["H100"] * REACHED
LEAST_MEMORY = 70e9  # bytes of a GPU, of the record's batch
MATRIX, SECONDS = 8192, 1.0
CPU_MATRIX, CPU_SECONDS = 1024, 0.3


def gpus(wanted: int | None) -> list[Finding]:
    """Return the GPUs that torch sees, against how many are wanted."""
    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted and here < wanted:
        return [failed("GPUs", f"{here} here, {wanted} wanted", "another machine, or torchrun --nproc_per_node")]
    if not here:
        return [ok("GPUs", "none: everything runs on the CPUs")]
    found = []
    for index in range(here):
        own = torch.cuda.get_device_properties(index)
        value = f"{own.name}, {own.total_memory / 1e9:.0f} GB"
        small = own.total_memory < LEAST_MEMORY
        mend = "smaller data.micro_batch_tokens: the record's batch is made for 80 GB"
        found.append(warning(f"GPU {index}", value, mend) if small else ok(f"GPU {index}", value))
    return [*found, *busy()]


def busy() -> list[Finding]:
    """Return what nvidia-smi says of clocks and of other processes on the GPUs."""
    found = []
    for row in query("index", "clocks.sm", "clocks.max.sm", "temperature.gpu", "power.limit"):
        found.append(ok(f"GPU {row[0]} clocks", f"{row[1]} of {row[2]} MHz, {row[3]} °C, limit {row[4]} W"))
    others = query("pid", "used_memory", what="compute-apps")
    if others:
        listed = ", ".join(f"process {row[0]} ({row[1]} MB)" for row in others)
        found.append(warning("other work", listed, "end what is yours, or ask for a pod of your own"))
    return found


def matmul() -> list[Finding]:
    """Return each device's speed in a large matrix product, against its rating."""
    if not torch.cuda.is_available():
        rate = rate_of(torch.device("cpu"), CPU_MATRIX, torch.float32, CPU_SECONDS)
        return [ok("matrix product", f"{rate:.2f} TFLOP/s in float32 on {num_threads()} threads")]
    found = []
    for index in range(torch.cuda.device_count()):
        name = torch.cuda.get_device_name(index)
        rate = rate_of(torch.device("cuda", index), MATRIX, torch.bfloat16, SECONDS)
        found.append(judged(f"GPU {index} speed", name, rate))
    return found


def rate_of(device: torch.device, size: int, dtype: torch.dtype, seconds: float) -> float:
    """Return TFLOP/s of products of two square matrices over about so many seconds."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    synchronize: Callable[[], None] = (
        (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)
    )
    a @ b  # the first one also chooses a kernel
    synchronize()
    started, times = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        a @ b
        synchronize()
        times += 1
    return 2 * size**3 * times / (time.perf_counter() - started) / 1e12


def judged(name: str, device: str, rate: float) -> Finding:
    """Return whether a device reaches what its kind does; an unknown kind is compared with an H100 alone."""
    value = f"{rate:.0f} TFLOP/s in bfloat16, {100 * rate / H100:.0f} % of an H100's"
    rating = next((each for kind, each in RATINGS.items() if kind in device), None)
    if rating is not None and rate < SLOW * REACHED * rating:
        expected = REACHED * rating
        return warning(name, f"{value}; {device} should reach {expected:.0f}", "a slow pod: ask for another")
    return ok(name, value)
