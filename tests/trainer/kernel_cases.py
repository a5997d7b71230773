"""What `test_kernels.py` runs in processes of their own: `python -m tests.trainer.kernel_cases cpu|cuda …`.

Triton decides when a kernel is defined whether it is interpreted, so interpreted kernels need a fresh process with
TRITON_INTERPRET=1. The answer is one line of JSON. An error is relative to the largest absolute value of what eager
PyTorch computes in float32 from the same inputs.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Errors = dict[str, float]

# (tokens, vocab, cap, scale of z): one token, odd sizes, a ragged third block, caps that saturate and caps that vanish
LOSS_CASES = {
    "loss one token, two pieces": (1, 2, 30.0, 10.0),
    "loss odd sizes": (37, 1001, 30.0, 10.0),
    "loss third block of one column": (5, 8193, 15.0, 20.0),
    "loss far beyond the cap": (9, 320, 30.0, 1000.0),
    "loss tiny cap": (9, 320, 1e-2, 0.02),
    "loss huge cap": (9, 320, 1e4, 10.0),
}

# (rows, model_dim, hidden_dim, slope): less than a tile, whole tiles, odd sizes, more rows of tiles than a group
MLP_CASES = {
    "mlp one row": (1, 16, 3, 0.5),
    "mlp whole tiles": (64, 128, 128, 0.5),
    "mlp odd sizes": (37, 70, 131, 0.5),
    "mlp relu2": (65, 64, 45, 0.0),
    "mlp small slope": (65, 64, 45, 0.01),
    "mlp slope 1": (65, 64, 45, 1.0),
    "mlp many tiles": (300, 20, 70, 0.5),
}


def relative(ours: Tensor, eager: Tensor) -> float:
    ours, eager = ours.detach().double(), eager.detach().double()
    return float((ours - eager).abs().max() / eager.abs().max())


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def eager_nats(z: Tensor, targets: Tensor, cap: float) -> Tensor:
    return F.cross_entropy(cap * torch.tanh(z.float() / cap), targets, reduction="none")


def eager_mlp(x: Tensor, up: Tensor, down: Tensor, slope: float) -> Tensor:
    return F.linear(F.leaky_relu(F.linear(x, up), slope).square(), down)


def loss_inputs(tokens: int, vocab: int, scale: float, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """(z, targets, a weight per token)"""
    z = scale * torch.randn(tokens, vocab, device=device)
    return z, torch.randint(vocab, (tokens,), device=device), torch.rand(tokens, device=device) + 0.1


def loss_errors(z: Tensor, targets: Tensor, weights: Tensor, cap: float) -> Errors:
    """Of nats and of dz, each token weighted differently."""
    from trainer.kernels.loss import softcapped_nats

    (ours,), (theirs,) = leaves(z), leaves(z)
    nats, expected = softcapped_nats(ours, targets, cap), eager_nats(theirs, targets, cap)
    (nats * weights).sum().backward()
    (expected * weights).sum().backward()
    assert nats.dtype == torch.float32
    assert ours.grad.dtype == z.dtype
    return {"value": relative(nats, expected), "gradient": relative(ours.grad, theirs.grad)}


def mlp_inputs(rows: int, dim: int, hidden: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """(x, up, down)"""
    up, down = torch.randn(hidden, dim, device=device), torch.randn(dim, hidden, device=device)
    return torch.randn(rows, dim, device=device), up * dim**-0.5, down * hidden**-0.5


def mlp_errors(x: Tensor, up: Tensor, down: Tensor, slope: float) -> Errors:
    """Of y and of all three gradients, against eager float32 whatever the type given."""
    from trainer.kernels.mlp import fused_mlp

    ours, theirs = leaves(x, up, down), leaves(x.float(), up.float(), down.float())
    y, expected = fused_mlp(*ours, slope), eager_mlp(*theirs, slope)
    weights = torch.randn_like(expected)
    (y * weights.to(y.dtype)).sum().backward()
    (expected * weights.to(y.dtype).float()).sum().backward()
    gradients = [relative(a.grad, b.grad) for a, b in zip(ours, theirs, strict=True)]
    return {"value": relative(y, expected), "gradient": max(gradients)}


def exact_cases(device: str) -> dict[str, Errors]:
    """Everything that must agree to float32's precision."""
    answer = {}
    for name, (tokens, vocab, cap, scale) in LOSS_CASES.items():
        answer[name] = loss_errors(*loss_inputs(tokens, vocab, scale, device), cap)
    z, targets, weights = loss_inputs(37, 1001, 10.0, device)
    answer["loss strided"] = loss_errors(z.repeat(1, 2)[:, ::2], targets, weights, 30.0)
    for name, (rows, dim, hidden, slope) in MLP_CASES.items():
        answer[name] = mlp_errors(*mlp_inputs(rows, dim, hidden, device), slope)
    x, up, down = mlp_inputs(24, 16, 40, device)
    answer["mlp strided, of three dimensions"] = mlp_errors(
        x.T.contiguous().T.view(4, 6, 16), up, down.T.clone().T, 0.5
    )
    return answer


def rounded_cases(device: str) -> dict[str, Errors]:
    """What is rounded to 8 or 11 bits on the way. (The interpreter's matmul does not have bfloat16.)"""
    z, targets, weights = loss_inputs(37, 1001, 10.0, device)
    narrow = torch.bfloat16 if device == "cuda" else torch.float16
    inputs = [tensor.to(narrow) for tensor in mlp_inputs(65, 64, 45, device)]
    return {"loss bfloat16": loss_errors(z.bfloat16(), targets, weights, 30.0), "mlp narrow": mlp_errors(*inputs, 0.5)}


def autocast_case(device: str) -> dict[str, Any]:
    """Types under autocast, and whether the gradient reaches the float32 weights."""
    from trainer.kernels.mlp import fused_mlp

    inputs = leaves(*mlp_inputs(65, 64, 45, device))
    with torch.autocast(device, torch.float16):
        y = fused_mlp(*inputs, 0.5)
        expected = eager_mlp(*inputs, 0.5)
    gradients = [torch.autograd.grad(out.float().sum(), inputs) for out in (y, expected)]
    worst = max(relative(a, b) for a, b in zip(*gradients, strict=True))
    types = [str(y.dtype), *(str(gradient.dtype) for gradient in gradients[0])]
    return {"types": types, "error": max(worst, relative(y, expected))}


def not_numbers(device: str) -> list[bool]:
    """Whether the nats are NaN, of a good token, one with a NaN among its logits, three with a target out of range."""
    from trainer.kernels.loss import softcapped_nats

    z = torch.randn(5, 320, device=device)
    z[1, 7] = float("nan")
    return softcapped_nats(z, torch.tensor([0, 0, -100, 320, 1 << 40], device=device), 30.0).isnan().tolist()


def refusals(device: str) -> dict[str, str]:
    """The messages of what the kernels refuse."""
    from pgolf_post.errors import MismatchError
    from trainer.kernels.loss import softcapped_nats
    from trainer.kernels.mlp import fused_mlp

    z, targets, _ = loss_inputs(3, 5, 1.0, device)
    x, up, down = mlp_inputs(4, 6, 8, device)
    calls = {
        "shape": lambda: softcapped_nats(z, targets[:2], 30.0),
        "type": lambda: softcapped_nats(z.double(), targets, 30.0),
        "weights": lambda: fused_mlp(x, down, up, 0.5),
        "double": lambda: fused_mlp(x.double(), up.double(), down.double(), 0.5),
    }
    messages = {}
    for name, call in calls.items():
        try:
            messages[name] = f"no error: {call()}"
        except MismatchError as error:
            messages[name] = str(error)
    return messages


def registrations(device: str) -> dict[str, str]:
    """`opcheck` of every custom op (schema, fake tensors, tracing), then both functions in one graph each."""
    from trainer.kernels import loss, mlp

    z, targets, _ = loss_inputs(3, 5, 1.0, device)
    x, up, down = mlp_inputs(4, 6, 8, device)
    nats, lse = loss.nats_op(z, targets, 30.0)
    h, negative = mlp.up_op(x, up, 0.5)
    calls = {
        loss.nats_op: (z, targets, 30.0),
        loss.gradient_op: (nats, z, targets, lse, 30.0),
        mlp.up_op: (x, up, 0.5),
        mlp.down_backward_op: (x, down, h, negative, 0.5),
    }
    return {op._qualname: str(set(torch.library.opcheck(op, arguments).values())) for op, arguments in calls.items()}


def compiled_case(device: str) -> dict[str, bool]:
    """Whether torch.compile takes MLP and loss as one graph, forward and backward, and changes no bit."""
    from trainer.kernels.loss import softcapped_nats
    from trainer.kernels.mlp import fused_mlp

    targets = torch.arange(4, device=device)

    def step(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return softcapped_nats(fused_mlp(x, up, down, 0.5), targets, 30.0).mean()

    inputs = leaves(*mlp_inputs(4, 6, 8, device))
    answers = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        loss = function(*inputs)
        answers.append([loss, *torch.autograd.grad(loss, inputs)])
    return {"same": all(torch.equal(a, b) for a, b in zip(*answers, strict=True))}


def training_case(device: str, data: Path, root: Path) -> dict[str, Any]:
    """Pico runs with and without kernels: losses, what meta says, how often the kernels were asked."""
    from pgolf_post.data import DataFolder
    from tests.conftest import pico_recipe
    from trainer.kernels import loss, mlp
    from trainer.run import loop

    calls = {"loss": 0, "mlp": 0}

    def counted(name: str, function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            calls[name] += 1
            return function(*arguments)

        return call

    loss.softcapped_nats, mlp.fused_mlp = counted("loss", loss.softcapped_nats), counted("mlp", mlp.fused_mlp)
    loop.require_usable = lambda recipe, device_type: None  # interpreted kernels do not need the GPU it asks for
    answer: dict[str, Any] = {"calls": calls}
    for kernels in ("eager", "triton"):
        run = {"kernels": kernels, "name": kernels}
        recipe = pico_recipe(
            DataFolder.open(data), root, run=run, data={"micro_batch_tokens": 32}, schedule={"steps": 4}
        )
        checkpoint = loop.Trainer(recipe, loop.SINGLE_PROCESS).run()
        lines = (checkpoint.path.parent / "train.jsonl").read_text().splitlines()
        keys = ("step", "loss", "grad_norm", "active_loops")
        answer[kernels] = [{key: json.loads(line)[key] for key in keys} for line in lines]
        answer[f"{kernels} meta"] = checkpoint.meta["kernels"]
    return answer


def compile_offline(capability: int, every_tiling: bool) -> dict[str, dict[str, int]]:
    """Per kernel and tiling: tensor-core instructions of its code, bytes of shared memory and of spilled registers.

    Nothing is run, so no GPU is needed. Without `every_tiling` the MLP is compiled for one of its tilings.
    """
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from trainer.kernels import loss, mlp

    jobs: dict[str, tuple[Any, dict[str, Any], int, int]] = {
        "nats": (loss.nats_kernel, {"BLOCK": loss.MAX_BLOCK}, loss.NUM_WARPS, 1),
        "gradient": (loss.gradient_kernel, {"BLOCK": loss.MAX_BLOCK}, loss.NUM_WARPS, 1),
    }
    matmuls = ("up", mlp.up_kernel.fn, mlp.UP_CONFIGS), ("down_backward", mlp.down_backward_kernel.fn, mlp.CONFIGS)
    for name, kernel, tilings in matmuls:
        for tiling in tilings if every_tiling else mlp.CONFIGS[:1]:
            values = {"SIGNED": True, "EVEN_K": True, "PRECISION": "tf32", "GROUP": mlp.GROUP, **tiling.kwargs}
            size = f"{tiling.kwargs['BLOCK_M']}x{tiling.kwargs['BLOCK_N']}"
            jobs[f"{name} {size}"] = (kernel, values, tiling.num_warps, tiling.num_stages)
    special = {"targets_ptr": "*i64", "nats_ptr": "*fp32", "lse_ptr": "*fp32", "grad_ptr": "*fp32"}
    special |= {"negative_ptr": "*u8", "cap": "fp32", "slope": "fp32"}
    answer = {}
    for name, (kernel, values, warps, stages) in jobs.items():
        types = {arg: special.get(arg, "*bf16" if arg.endswith("_ptr") else "i32") for arg in kernel.arg_names}
        types |= dict.fromkeys(values, "constexpr")
        aligned = [(i,) for i, arg in enumerate(kernel.arg_names) if types[arg].startswith("*") or types[arg] == "i32"]
        source = ASTSource(kernel, types, values, {index: [["tt.divisibility", 16]] for index in aligned})
        options = {"num_warps": warps, "num_stages": stages}
        built = compile_kernel(source, target=GPUTarget("cuda", capability, 32), options=options)
        products = sum(built.asm["ptx"].count(word) for word in ("wgmma.mma_async", "mma.sync"))
        answer[name] = {
            "tensor_core": products,
            "shared": built.metadata.shared,
            "spilled": spilled_bytes(built.asm["cubin"]),
        }
    return answer


def spilled_bytes(cubin: bytes) -> int:
    """Bytes of each thread's stack and local memory, where registers that do not fit go."""
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__ or "").parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return sum(int(number) for number in re.findall(r"(?:STACK|LOCAL):(\d+)", said))


def all_cases(device: str, data: Path, root: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    return {
        "exact": exact_cases(device),
        "rounded": rounded_cases(device),
        "autocast": autocast_case(device),
        "not_numbers": not_numbers(device),
        "refusals": refusals(device),
        "registrations": registrations(device),
        "compiled": compiled_case(device),
        "training": training_case(device, data, root),
    }


if __name__ == "__main__":
    what, *folders = sys.argv[1:]
    print(json.dumps(all_cases(what, *map(Path, folders))))
