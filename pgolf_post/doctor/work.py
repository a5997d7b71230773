"""Small pieces of real work: compiling, a step of each attention kernel, two processes that add up."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

import torch

from pgolf_post.base.threads import THREAD_VARIABLES
from pgolf_post.doctor.findings import Finding, failed, ok, warning
from pgolf_post.families import build_module, get_family

SLOW_COMPILE = 60.0  # seconds, of three lines
ALL_REDUCE_SECONDS = 90
PICO = {"num_layers": 2, "model_dim": 128, "num_heads": 2, "num_kv_heads": 1, "rope_dims": 16, "xsa_last_n": 0}

ALL_REDUCE = """
import sys, torch, torch.distributed as dist
rank, backend, port = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
if backend == "nccl":
    torch.cuda.set_device(device)
store = dist.TCPStore("127.0.0.1", port, 2, rank == 0)
dist.init_process_group(backend, store=store, rank=rank, world_size=2)
total = torch.full((1 << 16,), rank + 1.0, device=device)
dist.all_reduce(total)
assert bool((total == 3.0).all()), total
dist.barrier()
print("added", flush=True)
import os
os._exit(0)
"""


def device() -> torch.device:
    """Return the device that work runs on here."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def compiling() -> list[Finding]:
    """Compile three lines and run them: a missing C++ compiler or a broken cache shows here."""
    started = time.perf_counter()

    def lines(x: torch.Tensor) -> torch.Tensor:
        y = torch.nn.functional.rms_norm(x, (64,))
        return (y * 2).square().sum()

    x = torch.randn(64, 64, device=device())
    try:
        compiled = torch.compile(lines)(x)
    except Exception as error:
        first = str(error).strip().splitlines()[0][:160] if str(error).strip() else ""
        mend = "apt-get install g++, or train with run.compile = false"
        return [warning("torch.compile", f"{type(error).__name__}: {first}", mend)]
    seconds = time.perf_counter() - started
    if not torch.allclose(compiled, lines(x), rtol=1e-4):
        return [failed("torch.compile", "the compiled lines give another result", "run.compile = false")]
    value = f"{seconds:.1f} s for three lines"
    if seconds > SLOW_COMPILE:
        return [warning("torch.compile", value, "a busy or slow CPU: warm-up will take minutes")]
    return [ok("torch.compile", value)]


def attention(family: str = "golf_gpt") -> list[Finding]:
    """Run one step, forward and backward, of every attention kernel that a family's model can choose from."""
    where = device()
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    model: Any = build_module({"family": family, "model": _pico_model(family), "graph": {}})
    table = _backends(model)
    if not table:
        return []
    found = []
    for name, backend in table.items():
        reason = backend.unavailable(where, dtype, True)
        if reason:
            found.append(ok(f"attention {name}", f"not for this machine: {reason}"))
            continue
        seconds, error = _step(backend, where, dtype)
        label, value = f"attention {name}", f"one step in {seconds:.2f} s"
        found.append(failed(label, error, "choose another: run.attention") if error else ok(label, value))
    return found


def _pico_model(family: str) -> dict[str, Any]:
    return get_family(family).complete({**PICO, "vocab_size": 64, "train_seq_len": 64})


def _backends(model: Any) -> Mapping[str, Any]:
    """Return the kernels by name, from the module that the model's own kernel is of; empty where it has no table."""
    own = getattr(model, "attention_backend", None)
    module = sys.modules.get(type(own).__module__)
    table: Mapping[str, Any] = getattr(module, "BACKENDS", {})
    return table


def _step(backend: Any, where: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """Run attention over two documents, forward and backward. Return seconds, and what went wrong."""
    started = time.perf_counter()
    try:
        tokens = torch.ones(2, 128, dtype=torch.int64)
        document = torch.arange(128).expand(2, 128) // 64
        q, k, v = (torch.randn(2, 2, 128, 64, device=where, dtype=dtype, requires_grad=True) for _ in range(3))
        backend.attend(q, k, v, backend.reach(tokens, document, where)).float().sum().backward()
        finite = q.grad is not None and bool(torch.isfinite(q.grad).all())
    except Exception as error:
        return time.perf_counter() - started, f"{type(error).__name__}: {error}"[:200]
    return time.perf_counter() - started, "" if finite else "its gradient is not finite"


def all_reduce(gpus: int) -> list[Finding]:
    """Let two processes add up a tensor: over NCCL where there are two GPUs, else over gloo."""
    backend = "nccl" if torch.cuda.is_available() and gpus >= 2 and torch.cuda.device_count() >= 2 else "gloo"
    started, port = time.perf_counter(), _free_port()
    environment = {**_environment(), **dict.fromkeys(THREAD_VARIABLES, "1")}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", ALL_REDUCE, str(rank), backend, str(port)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    try:
        outputs = [each.communicate(timeout=ALL_REDUCE_SECONDS) for each in processes]
    except subprocess.TimeoutExpired:
        mend = "look for a firewall on loopback, or set NCCL_DEBUG=INFO"
        return [failed("two processes", f"no answer over {backend} in {ALL_REDUCE_SECONDS} s", mend)]
    finally:
        for each in processes:
            each.kill()
            each.wait()
    if all("added" in out for out, _ in outputs):
        return [ok("two processes", f"all-reduce over {backend} in {time.perf_counter() - started:.1f} s")]
    error = next((err.strip().splitlines()[-1] for _, err in outputs if err.strip()), "no message")
    return [failed("two processes", f"{backend}: {error}"[:200], "set NCCL_DEBUG=INFO, or train on one GPU")]


def _free_port() -> int:
    import socket

    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        port: int = own.getsockname()[1]
        return port


def _environment() -> dict[str, str]:
    import os

    return dict(os.environ)
