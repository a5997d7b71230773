"""Kernels, bytes, graphs and memory of a training step on a GPU that is not there: counted, not timed.

`python -m tests.gpu.step_count LIBRARY [CASE …]` prints one JSON line a case; a case is `record;varlen;KEY=VALUE;…`.
Tensors are fake ones on CUDA (`tests.gpu.fake_cuda`), of their full size; the real Inductor lowers and fuses every
graph for an H100, and stops before it writes code. Counted are

* bytes: what the generated kernels (elementwise and reductions) read and write, by Inductor's own account of each;
* launches: kernels of the graphs, the sums and copies that come with them, and those of eager operations around them,
  `_foreach_` by its chunks;
* graphs: whole compilations of the loss, and later ones, which are of Muon's updates; a break would be an error;
* GiB: the most that storages hold at once, operation by operation as if nothing were fused: an upper bound.

Graph interpretation stands in for running the written code: the storages that a graph leaves for backward are true.
"""

from __future__ import annotations

import copy
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.gpu.fake_cuda import GIB, RECORD, load_guard, making_fake_tensors

H100 = SimpleNamespace(
    name="NVIDIA H100",
    gcnArchName="",
    major=9,
    minor=0,
    total_memory=80 * GIB,
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    L2_cache_size=50 * 2**20,
)
FREE = {"empty", "empty_strided", "new_empty", "new_empty_strided", "empty_like", "detach", "_local_scalar_dense"}
CHUNK, BLOCKS = 65536, 320  # of torch's kernels over lists of tensors (MultiTensorApply.cuh)
TENSORS = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}  # lists → the most tensors of each in one launch


@dataclass
class Count:
    """What a step did so far."""

    graphs: int = 0
    launches: Counter[str] = field(default_factory=Counter)  # by kind
    gigabytes: float = 0.0  # of generated kernels
    heaviest: list[tuple[float, str]] = field(default_factory=list)  # GB of a generated kernel, its operations

    def add(self, other: Count) -> None:
        self.launches.update(other.launches)
        self.gigabytes += other.gigabytes
        self.heaviest += other.heaviest


class Storages:
    """The bytes of the storages on the fake GPU that are alive, and the most there were."""

    def __init__(self) -> None:
        self.alive: dict[int, tuple[Any, int]] = {}  # a weak reference, bytes
        self.total = self.peak = 0

    def see(self, out: Any) -> None:
        """Take in what an operation returned."""
        from torch import Tensor
        from torch.multiprocessing.reductions import StorageWeakRef
        from torch.utils._pytree import tree_leaves

        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.device.type == "cuda":
                storage = tensor.untyped_storage()
                held = self.alive.get(storage._cdata)
                if held is None or held[0].expired():
                    self.total += storage.nbytes() - (held[1] if held else 0)
                    self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        if self.total > self.peak:  # perhaps some have gone since
            self.drop_expired()
            self.peak = max(self.peak, self.total)

    def drop_expired(self) -> None:
        for key in [key for key, (reference, _) in self.alive.items() if reference.expired()]:
            self.total -= self.alive.pop(key)[1]

    def forget_peak(self) -> None:
        """Begin to look for the peak anew."""
        self.drop_expired()
        self.peak = self.total


def record_recipe(overrides: Sequence[str] = ()) -> Any:
    """Return the record recipe, changed by KEY=VALUE."""
    from pgolf_post.settings import read_settings
    from trainer.config import Recipe

    return read_settings(Path(__file__).parents[2] / "trainer" / "recipes" / RECORD, Recipe, list(overrides))


def pretend_h100() -> None:
    """Answer torch's and Triton's questions about the GPU; nothing is asked of a driver."""
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    cuda: Any = torch.cuda
    cuda.is_available, cuda.is_initialized = lambda: True, lambda: True
    cuda.is_bf16_supported = lambda *_, **__: True
    cuda.device_count, cuda.current_device = lambda: 1, lambda: 0
    cuda.get_device_properties, cuda._get_device_properties = lambda *_: H100, lambda *_: H100
    cuda.get_device_capability = lambda *_: (H100.major, H100.minor)
    cuda._exchange_device, cuda._maybe_exchange_device = lambda *_: 0, lambda *_: 0
    cuda.get_rng_state = lambda *_: torch.zeros(16, dtype=torch.uint8)
    for name in ("set_rng_state", "_lazy_init", "set_device", "synchronize"):
        setattr(cuda, name, lambda *_: None)  # a function each: Dynamo tells them apart
    target = GPUTarget("cuda", 10 * H100.major + H100.minor, H100.warp_size)
    limits = SimpleNamespace(get_device_properties=lambda *_: {"max_shared_mem": H100.shared_memory_per_block_optin})
    answers = {
        "get_current_target": lambda: target,
        "get_current_device": lambda: 0,
        "get_current_stream": lambda *_: 0,
    }
    driver.set_active(SimpleNamespace(**answers, utils=limits))


def trace_patterns_on_the_cpu() -> None:
    """Let Inductor trace the patterns it looks for with CPU tensors: some would be real ones on CUDA."""
    import torch
    from torch._inductor.fx_passes import joint_graph, post_grad

    passes: Any
    for passes in (joint_graph, post_grad):
        passes.lazy_init = partial(lambda trace, *_: trace(torch.device("cpu")), passes.lazy_init)


# ---- compiled graphs -------------------------------------------------------------------------------------------------


class Scheduled(Exception):
    """Inductor has decided on a graph's kernels."""


class Inductor:
    """A backend for torch.compile that counts each graph, and interprets it when it is called."""

    def __init__(self) -> None:
        self.graphs, self.of_step, self.interpreting, self.watched = 0, Count(), False, False
        self.storages = Storages()

    def __call__(self, module: Any, inputs: Any) -> Any:
        from torch._inductor.compile_fx import compile_fx

        self.graphs += 1
        return compile_fx(module, inputs, inner_compile=self.compile_one)

    def compile_one(self, module: Any, inputs: Any, **options: Any) -> Any:
        """Lower a forward or a backward, and return what interprets it."""
        from torch import fx, no_grad
        from torch._inductor.compile_fx import compile_fx_inner
        from torch._inductor.graph import GraphLowering
        from torch._subclasses.fake_tensor import unset_fake_temporarily

        kept, counts = copy.deepcopy(module), Count()

        def stop(lowered: Any) -> Any:
            lowered.init_wrapper_code()
            lowered._update_scheduler()  # fuses
            count_kernels(lowered.scheduler.nodes, counts)
            raise Scheduled

        before, GraphLowering.compile_to_module = GraphLowering.compile_to_module, stop  # type: ignore[method-assign]
        try:
            with unset_fake_temporarily():
                compile_fx_inner(module, inputs, **options)
        except Exception as error:
            if not counts.launches:
                raise error
        finally:
            GraphLowering.compile_to_module = before  # type: ignore[method-assign]

        def call(arguments: list[Any]) -> Any:
            if self.watched:
                self.of_step.add(counts)
            with self.interpretation(), no_grad():
                return fx.Interpreter(kept).boxed_run(arguments)

        call._boxed_call = True  # type: ignore[attr-defined]
        return call

    @contextmanager
    def interpretation(self) -> Iterator[None]:
        """Inside, operations are those of a graph, which are counted already."""
        before, self.interpreting = self.interpreting, True
        try:
            yield
        finally:
            self.interpreting = before


def count_kernels(nodes: list[Any], counts: Count) -> None:
    """Add a lowered graph's kernels and bytes: what is fused is one node."""
    done_by_sums = {name for node in nodes if is_mixed(node) for name in final_sums(node)[1]}
    for node in nodes:
        kind = type(node).__name__
        if node.is_extern():
            counts.launches["library"] += type(node.node).__name__ != "MultiOutput"
            if adds_a_matrix(node.node):
                counts.launches["copy"] += 1
        elif "Nop" not in kind:
            origins = {origin.name for part in node.get_nodes() if part.node for origin in part.node.get_origins()}
            size = node.get_read_write_buffers_sizes() / 1e9
            counts.launches["generated"] += any(part.get_name() not in done_by_sums for part in node.get_nodes())
            if is_mixed(node):
                counts.launches["sum"] += final_sums(node)[0]
            counts.gigabytes += size
            counts.heaviest.append((round(size, 3), f"{kind}: {' '.join(sorted(origins))}"[:160]))


def is_mixed(node: Any) -> bool:
    """Return whether a node is a kernel that reduces rows, and columns into partial sums."""
    return type(node).__name__ == "FusedMixOrderReductions"


def final_sums(node: Any) -> tuple[int, set[str]]:
    """Return how many eager sums end a mixed kernel, one for each sum of columns, and the names of the nodes that they
    stand for, which are not launched (torch/_inductor/codegen/simd.py, _codegen_mix_order_reduction)."""
    of_columns = [part for part in node.node2.get_nodes() if part.is_reduction()]
    if not of_columns[0].node._split_size:
        return len(of_columns), set()
    return len(of_columns), {part.get_outputs()[0].users[0].node.get_name() for part in of_columns}


def adds_a_matrix(node: Any) -> bool:
    """Return whether a library call is a product plus a matrix, which is copied to the output before it."""
    name = str(getattr(node, "python_kernel_name", ""))
    return name.endswith("addmm") and len(node.inputs[0].get_size()) == 2


# ---- eager operations ------------------------------------------------------------------------------------------------


def chunked_launches(sizes: list[int], lists: int) -> int:
    """Return the launches of a kernel over lists of tensors, given each tensor's number of elements."""
    launches = tensors = blocks = 0
    for size in sizes:
        tensors += 1
        for chunk in range(-(-size // CHUNK)):
            blocks += 1
            last = chunk == -(-size // CHUNK) - 1
            if blocks == BLOCKS or (tensors == TENSORS[lists] and last):
                launches, blocks, tensors = launches + 1, 0, 0 if last else 1
    return launches + bool(blocks)


def eager_launches(func: Any, args: tuple[Any, ...]) -> int:
    """Return the kernels that an operation launches on a GPU."""
    from torch import Tensor

    name = func._schema.name.removeprefix("aten::")
    is_view = any(one.alias_info and not one.alias_info.is_write for one in func._schema.returns)
    if is_view or name in FREE or name.startswith("prim::"):
        return 0
    if name.startswith(("_foreach_", "_fused_")):
        lists = [one for one in args if isinstance(one, (list, tuple)) and one and isinstance(one[0], Tensor)]
        large = [one for one in lists if one[0].numel() > 1 or len(lists) == 1]
        written = len(large) + (name[-1] != "_")  # what is not in place is written to a list more
        return chunked_launches([tensor.numel() for tensor in large[0]], written) + name.startswith("_foreach_norm")
    if name == "baddbmm":  # copies what is added, then multiplies
        return 2
    return 1


def fake_mode(inductor: Inductor) -> Any:
    """Return a mode of fake tensors that counts the operations outside of graphs."""
    from torch._higher_order_ops.flex_attention import flex_attention, flex_attention_backward
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._pytree import tree_leaves

    class Counting(FakeTensorMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = super().__torch_dispatch__(func, types, args, kwargs)
            inductor.storages.see(out)
            if inductor.watched and not inductor.interpreting:
                devices = [leaf.device.type for leaf in tree_leaves((args, kwargs, out)) if hasattr(leaf, "device")]
                if "cuda" in devices and "cpu" not in devices and (launches := eager_launches(func, args)):
                    inductor.of_step.launches[f"eager {func._schema.name.removeprefix('aten::')}"] += launches
            return out

    for operator in (flex_attention, flex_attention_backward):  # their rules are looked up by the very class
        operator.py_impl(Counting)(operator.python_key_table[FakeTensorMode])
    return Counting(allow_non_fake_inputs=True)


# ---- the step --------------------------------------------------------------------------------------------------------


def step_facts(loops: int, backend: str, overrides: list[str], inductor: Inductor) -> dict[str, Any]:
    """Count a whole step of the record recipe on one of eight GPUs: forward, backward, optimizer, averages."""
    import torch

    from trainer.kernels import MLP_KERNELS, chosen_kernels, fuse_mlps
    from trainer.model.architecture import GraphState
    from trainer.model.attention_backends import BACKENDS, Reach
    from trainer.model.gpt import GolfGPT
    from trainer.optim.averages import Averages
    from trainer.optim.compiled_updates import updates_for
    from trainer.optim.optimizer import Optimizer
    from trainer.step import compiled
    from trainer.step.distributed import SINGLE_PROCESS
    from trainer.step.gradients import GradientAccumulator

    recipe = record_recipe(overrides)
    inductor.graphs, inductor.of_step = 0, Count()
    compiled.COMPILER = inductor  # type: ignore[assignment]
    torch._dynamo.reset()
    device = torch.device("cuda", 0)
    with making_fake_tensors():
        model = GolfGPT(recipe.model_config_for(8192), GraphState(active_loops=loops))
    model.attention_backend = BACKENDS[backend]  # type: ignore[index]
    if chosen_kernels(recipe, device, torch.bfloat16) in MLP_KERNELS:
        fuse_mlps(model)
    ranks = SimpleNamespace(device=device, world_size=1, rank=0)
    micro = recipe.data.micro_batch_tokens or recipe.data.batch_tokens
    gradients = GradientAccumulator(recipe, model, ranks, torch.bfloat16, micro)  # type: ignore[arg-type]
    optimizer = Optimizer(model, recipe.optim, SINGLE_PROCESS, updates_for(recipe.run.compile, device))
    averages = Averages.begin(model, recipe.optim)
    shape = micro // recipe.data.seq_len, recipe.data.seq_len
    with device:
        tokens = torch.zeros(shape, dtype=torch.int64)
        within = reach_of(backend, shape)
    reach = Reach(model.attention_backend, within)
    model.reach = lambda *_: reach  # type: ignore[method-assign]

    of_loss: list[int] = []  # graphs, after each backward

    def step() -> None:
        gradients.accumulate([(tokens, tokens)])
        of_loss.append(inductor.graphs)
        optimizer.step(1.0, 0.95)
        averages.update(1, 0.5)

    step()  # compiles
    inductor.watched = True
    inductor.storages.forget_peak()
    step()
    inductor.watched = False
    count = inductor.of_step
    return {
        "graphs": of_loss[0],
        "later graphs": inductor.graphs - of_loss[0],
        "launches": sum(count.launches.values()),
        "gigabytes": round(count.gigabytes, 3),
        "by kind": dict(count.launches.most_common()),
        "heaviest": sorted(count.heaviest, reverse=True)[:40],
        "peak_gib": round(inductor.storages.peak / GIB, 2),
    }


def reach_of(backend: str, shape: tuple[int, int]) -> Any:
    """Return who attends to whom, in the backend's form, on the GPU: a boundary every few hundred tokens."""
    import torch

    batch, seq_len = shape
    documents = max(2, batch * seq_len // 330)
    if backend == "varlen":
        return torch.zeros(documents + 1, dtype=torch.int32)
    if backend == "fa3":
        return torch.zeros(documents + 1, dtype=torch.int32), torch.zeros(documents + 1, dtype=torch.int32)
    if backend == "sdpa":
        return torch.zeros(batch, 1, seq_len, seq_len, dtype=torch.bfloat16)
    from trainer.model.attention_backends import BACKENDS

    tokens = torch.zeros(shape, dtype=torch.int64)
    return BACKENDS[backend].reach(tokens, tokens, tokens.device)  # type: ignore[index]


SMALL = ["model.num_layers=3", "model.loop_start=1", "model.loop_end=1", "model.num_loops=1", "model.lanes_start=2"]
CASES: dict[str, tuple[int, list[str]]] = {
    "record": (0, []),
    "loops": (2, []),
    "small": (1, [*SMALL, "data.micro_batch_tokens=8192"]),
    "small-without-loops": (0, [*SMALL, "data.micro_batch_tokens=8192"]),
}


def main() -> None:
    load_guard(sys.argv[1])
    import torch
    import torch._functorch.config
    import torch._inductor.config

    from tests.trainer.test_attention import fa3_stand_in
    from trainer.model.attention_backends import fa3_installed

    pretend_h100()
    torch._inductor.config.fx_graph_cache = False  # type: ignore[assignment]
    torch._functorch.config.enable_autograd_cache = False  # type: ignore[assignment]
    torch._inductor.config.compile_threads = 1
    torch._inductor.config.shape_padding = False  # it would time products
    torch._inductor.config.joint_graph_constant_folding = False  # it would compute on the GPU
    trace_patterns_on_the_cpu()
    inductor = Inductor()
    with fake_mode(inductor):
        for name in sys.argv[2:]:
            case, backend, *overrides = name.split(";")
            if backend == "fa3" and not fa3_installed():
                sys.modules["flash_attn_interface"] = fa3_stand_in()
            loops, fixed = CASES[case]
            print(json.dumps({"case": name, **step_facts(loops, backend, [*fixed, *overrides], inductor)}), flush=True)


if __name__ == "__main__":
    main()
