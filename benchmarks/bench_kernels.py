"""The Triton kernels (trainer/kernels) against eager PyTorch and torch.compile, forward and backward, in the same run.

Shapes of the record recipe: its micro-batch and one GPU's whole share of a step, 8,192 pieces, 512 → 2,048, bfloat16.
Each is first checked against eager float32 on a smaller batch. Times are medians, the contestants taken in turn; memory
is what a forward and backward allocate at their peak beyond the inputs. Without a CUDA GPU nothing is measured.
"""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from pgolf_post.base.progress import print_table, say
from pgolf_post.provenance import accelerator_name

TOKENS = (32_768, 98_304)
CHECK_TOKENS = 2048
VOCAB, DIM, HIDDEN, SLOPE, CAP = 8192, 512, 2048, 0.5, 30.0
WARM_ROUNDS, ROUNDS = 5, 21

Function = Callable[..., Tensor]


def loss_inputs(tokens: int) -> list[Tensor]:
    """z and targets."""
    z = (10 * torch.randn(tokens, VOCAB, device="cuda")).bfloat16().requires_grad_()
    return [z, torch.randint(VOCAB, (tokens,), device="cuda")]


def mlp_inputs(tokens: int) -> list[Tensor]:
    """x and both weights."""
    shapes = ((tokens, DIM), (HIDDEN, DIM), (DIM, HIDDEN))
    scales = (1.0, DIM**-0.5, HIDDEN**-0.5)
    pairs = zip(shapes, scales, strict=True)
    return [(scale * torch.randn(shape, device="cuda")).bfloat16().requires_grad_() for shape, scale in pairs]


def contestants() -> dict[str, tuple[Callable[[int], list[Tensor]], dict[str, Function]]]:
    """What is measured: how to make inputs, then eager, compiled and fused, each giving what is differentiated."""
    from tests.trainer.kernel_cases import eager_mlp, eager_nats
    from trainer.kernels.loss import softcapped_nats
    from trainer.kernels.mlp import fused_mlp

    def loss(nats: Function) -> Function:
        return lambda z, targets: nats(z, targets, CAP).mean()

    def mlp(forward: Function) -> Function:
        return lambda x, up, down: forward(x, up, down, SLOPE)

    compiled_nats, compiled_mlp = torch.compile(eager_nats, dynamic=False), torch.compile(eager_mlp, dynamic=False)
    losses = {"eager": loss(eager_nats), "compiled": loss(compiled_nats), "triton": loss(softcapped_nats)}
    mlps = {"eager": mlp(eager_mlp), "compiled": mlp(compiled_mlp), "triton": mlp(fused_mlp)}
    return {"soft-capped loss": (loss_inputs, losses), "leaky-relu² MLP": (mlp_inputs, mlps)}


def gradients(function: Function, inputs: list[Tensor]) -> list[Tensor]:
    """The output and the gradients of all differentiable inputs. The MLP's output gradient is x, of the same shape."""
    output = function(*inputs)
    grad = inputs[0].detach() if output.dim() else None
    return [output.detach(), *torch.autograd.grad(output, [x for x in inputs if x.requires_grad], grad)]


def worst_error(function: Function, eager: Function, inputs: list[Tensor]) -> float:
    """The largest difference of output or gradients from eager float32, against the largest absolute value there."""
    wide = [x.detach().float().requires_grad_() if x.requires_grad else x for x in inputs]
    pairs = zip(gradients(function, inputs), gradients(eager, wide), strict=True)
    return max(float((ours - theirs).abs().max() / theirs.abs().max()) for ours, theirs in pairs)


def peak_mib(function: Function, inputs: list[Tensor]) -> float:
    """MiB of a forward and backward beyond what was allocated before."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    gradients(function, inputs)
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def milliseconds(functions: dict[str, Function], inputs: list[Tensor]) -> dict[str, float]:
    """Median time of forward and backward, the functions taken in turn; the first rounds compile and tune."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(WARM_ROUNDS + ROUNDS):
        for name, function in functions.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            gradients(function, inputs)
            end.record()
            end.synchronize()
            if number >= WARM_ROUNDS:
                times[name].append(start.elapsed_time(end))
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    if not torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        say("kernels: not run, for it needs a CUDA GPU and triton")
        return
    torch.manual_seed(0)
    rows = []
    for name, (make_inputs, functions) in contestants().items():
        small = make_inputs(CHECK_TOKENS)
        errors = {each: worst_error(function, functions["eager"], small) for each, function in functions.items()}
        for tokens in TOKENS:
            inputs = make_inputs(tokens)
            times = milliseconds(functions, inputs)
            for each, function in functions.items():
                ratios = (times["eager"] / times[each], times["compiled"] / times[each])
                memory = f"{peak_mib(function, inputs):,.0f}"
                speeds = (f"{times[each]:.3f}", *(f"{ratio:.3f}" for ratio in ratios))
                rows.append((name, f"{tokens:,}", each, *speeds, memory, f"{errors[each]:.1e}"))
    header = ("what", "tokens", "by", "ms", "× faster than eager", "than compiled", "peak MiB", "error")
    print_table(f"Kernels on {accelerator_name()}, bfloat16, forward and backward", header, rows)


if __name__ == "__main__":
    main()
