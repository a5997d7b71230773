"""The pretended device answers as CUDA would, in cases whose answers are known."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.gpu import pretend

Case = Callable[[Tensor, Tensor], object]  # of a CUDA tensor and a CPU tensor, both (3, 4)


def adamw_step(fused: bool) -> Case:
    def step(g: Tensor, c: Tensor) -> object:
        parameter = nn.Parameter(g.clone())
        parameter.grad = torch.ones_like(parameter)
        optimizer = torch.optim.AdamW([parameter], fused=fused, foreach=not fused)
        return optimizer.step()

    return step


REFUSED: dict[str, Case] = {
    "add": lambda g, c: g + c,
    "cat": lambda g, c: torch.cat([g, c]),
    "stack of numbers": lambda g, c: torch.stack([g.sum(), c.sum()]),
    "numpy": lambda g, c: g.numpy(),
    "index_select": lambda g, c: g.index_select(0, torch.tensor([0])),
    "CUDA index of a CPU tensor": lambda g, c: c[torch.tensor([0], device="cuda")],
    "linear": lambda g, c: nn.functional.linear(g, c),
    "embedding": lambda g, c: nn.functional.embedding(torch.tensor([1]), g),
    "gather": lambda g, c: g.gather(1, torch.zeros(3, 1, dtype=torch.int64)),
    "module": lambda g, c: nn.Linear(4, 2).to("cuda")(c),
    "arange on the CPU": lambda g, c: g + torch.arange(4),
}
TAKEN: dict[str, Case] = {
    "add of a number": lambda g, c: g + torch.tensor(2.0),
    "numpy by force": lambda g, c: g.numpy(force=True),
    "numpy of a copy": lambda g, c: g.cpu().numpy(),
    "CPU index": lambda g, c: g[torch.tensor([0, 1])],
    "copy": lambda g, c: g.copy_(c),
    "where": lambda g, c: torch.where(g > 0, g, 0.0),
    "item": lambda g, c: g.sum().item(),
    "backward": lambda g, c: (g.clone().requires_grad_() * 2).sum().backward(),
    "module": lambda g, c: nn.Linear(4, 2).to("cuda")(g).sum().backward(),
    "arange": lambda g, c: g + torch.arange(4, device=g.device),
    "fused AdamW": adamw_step(fused=True),
    "foreach AdamW": adamw_step(fused=False),
}


@pytest.mark.parametrize(
    ("case", "refused"),
    [*((case, True) for case in REFUSED.values()), *((case, False) for case in TAKEN.values())],
    ids=[*(f"refused: {name}" for name in REFUSED), *(f"taken: {name}" for name in TAKEN)],
)
def test_what_cuda_refuses_is_a_violation(case: Case, refused: bool) -> None:
    with pretend.cuda() as seen:
        g, c = torch.zeros(3, 4, device="cuda"), torch.ones(3, 4)
        seen.clear()
        case(g, c)
    assert bool(seen.violations) == refused, seen.violations


def test_devices_are_told_as_they_would_be() -> None:
    with pretend.cuda():
        g, c = torch.zeros(3, 4, device="cuda"), torch.ones(3, 4)
        on_gpu = [g, c.cuda(), torch.zeros_like(g), g.new_zeros(2), g[0], g.view(-1), g.to(torch.float64), (g * 2).mT]
        assert {tensor.device for tensor in on_gpu} == {torch.device("cuda", 0)}
        assert {tensor.device for tensor in (c, g.to("cpu"), g.cpu(), torch.zeros(2))} == {torch.device("cpu")}
    assert torch.zeros(3).device == torch.device("cpu")


def test_waiting_and_copying_are_counted() -> None:
    with pretend.cuda() as seen:
        g = torch.zeros(3, 4, device="cuda")
        for wait in (
            lambda: float(g.sum()),
            lambda: g.tolist(),
            lambda: g.nonzero(),
            lambda: g[g > 0],
            lambda: g.cpu(),
        ):
            seen.clear()
            wait()
            assert sum(seen.syncs.values()) == 1
        seen.clear()
        strided = torch.zeros(4, 5)[:, 1:]
        for tensor in (strided, strided.pin_memory(), strided.contiguous().pin_memory()):
            tensor.to("cuda", non_blocking=True)
        assert list(seen.hazards.values()) == [1, 1]
        host = torch.empty(3, 4, pin_memory=True)
        host.copy_(g, non_blocking=True)
        seen.clear()
        host.sum()
        assert len(seen.hazards) == 1


COMPILED_AFTER_PRETENDING = """
import torch
from tests.gpu import pretend

with pretend.cuda():
    import torch._dynamo  # an optimizer's first step does

def narrow(x):
    return x.to(torch.bfloat16 if torch.is_autocast_enabled("cpu") else torch.float64)

assert torch.compile(narrow, backend="eager", fullgraph=True)(torch.ones(2)).dtype == torch.float64
"""


def test_what_is_compiled_after_pretending_still_knows_torchs_own_functions() -> None:
    words = [sys.executable, "-c", COMPILED_AFTER_PRETENDING]
    done = subprocess.run(words, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
