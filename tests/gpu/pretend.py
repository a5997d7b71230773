"""A pretended CUDA device: real numbers on the CPU, each storage tagged with the device that it would be on.

A function mode rewrites device="cuda" to the CPU and tags what comes out; a dispatch mode sees every ATen operation,
backward included. Two tags that meet in one operation are a violation, as they would be an error on CUDA. Counted too,
with the innermost lines of the project that asked for them: synchronisations, transfers by kind, and hazards (a copy
that is asynchronous by name alone, host memory that is read while a copy may still write it). What it cannot tell:
CUDA's numbers, its choice of dtypes, speed.
"""

from __future__ import annotations

import collections
import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._dynamo  # its tables of torch's functions are made at its import: of torch's own, not of our replacements
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from trainer import kernels

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
ROOTS = ("/pgolf_post/", "/trainer/")
MOST_TAGS = 200_000
Base: Any = torch._C.TensorBase
Counts = collections.Counter[tuple[str, str]]  # (what, where) → how often


class Seen:
    """What was seen since `cuda` was entered. Storages are told apart by address, and forgotten when they are gone."""

    def __init__(self) -> None:
        self.violations, self.hazards, self.syncs, self.transfers = Counts(), Counts(), Counts(), Counts()
        self.tags: dict[int, tuple[StorageWeakRef, str]] = {}
        self.pinned: dict[int, StorageWeakRef] = {}
        self.in_flight: dict[int, StorageWeakRef] = {}  # host storages that an asynchronous copy is writing
        self.collectives: list[str] = []  # names and numbers of elements, in order
        self.factories: list[str] = []  # tags for tensors that a factory is making, the innermost last

    def clear(self) -> None:
        for counts in (self.violations, self.hazards, self.syncs, self.transfers):
            counts.clear()

    def sync(self, what: str) -> None:
        self.syncs[(what, site())] += 1
        self.in_flight.clear()

    def places(self, counts: Counts, inside: str) -> list[str]:
        """Return what was counted below a line of a function, given as file:function."""
        file, _, function = inside.partition(":")
        return sorted(
            f"{what} @ {where.split(' < ')[0]}"
            for what, where in counts.elements()
            if any(f"{file}:" in frame and frame.endswith(f":{function}") for frame in where.split(" < "))
        )


S = Seen()


def site() -> str:
    """Return the project's frames that are being run, the innermost first."""
    found, frame = [], sys._getframe(1)
    while frame is not None and len(found) < 12:
        name = frame.f_code.co_filename
        if any(root in name for root in ROOTS) and "/tests/" not in name:
            found.append(
                f"{name[max(name.rfind(root) for root in ROOTS) + 1 :]}:{frame.f_lineno}:{frame.f_code.co_name}"
            )
        frame = frame.f_back  # type: ignore[assignment]
    return " < ".join(found) or "outside"


# ---- tags ------------------------------------------------------------------------------------------------------------


def real_device(tensor: Tensor) -> torch.device:
    with torch._C.DisableTorchFunction():
        return Base.device.__get__(tensor)  # type: ignore[no-any-return]


def storage_of(tensor: Tensor) -> Any:
    with torch._C.DisableTorchFunction():
        return Base.untyped_storage(tensor)


def key_of(tensor: Tensor) -> int | None:
    try:
        return int(storage_of(tensor)._cdata)
    except (RuntimeError, NotImplementedError):
        return None


def tag(tensor: Tensor) -> str:
    found = S.tags.get(key_of(tensor) or 0)
    return found[1] if found else "cpu"


def set_tag(tensor: Any, value: str) -> None:
    if not isinstance(tensor, Tensor) or real_device(tensor).type != "cpu":
        return
    key = key_of(tensor)
    if key is None:
        return
    if value == "cpu":
        S.tags.pop(key, None)
    else:
        S.tags[key] = (StorageWeakRef(storage_of(tensor)), value)
    if len(S.tags) > MOST_TAGS:
        S.tags = {key: entry for key, entry in S.tags.items() if not entry[0].expired()}


def pinned(tensor: Tensor) -> bool:
    held = S.pinned.get(key_of(tensor) or 0)
    return held is not None and not held.expired()


def transfer(kind: str, tensor: Tensor, non_blocking: bool) -> None:
    with torch._C.DisableTorchFunction():
        contiguous = Base.is_contiguous(tensor)
    S.transfers[(f"{kind} {'asynchronous' if non_blocking else 'blocking'}", site())] += 1
    if kind == "to the GPU" and non_blocking and not (pinned(tensor) and contiguous):
        why = "pinned but strided: it goes through a pageable temporary" if pinned(tensor) else "not pinned"
        S.hazards[(f"an asynchronous copy from memory that is {why}", site())] += 1
    if not non_blocking:
        S.sync(f"copy {kind}")


def device_of(tensor: Tensor) -> torch.device:
    real = real_device(tensor)
    if real.type != "cpu":
        return real
    return CUDA if tag(tensor) == "cuda" else CPU


# ---- the function mode: what Python asks for -------------------------------------------------------------------------

FACTORIES = {
    *(torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.randint, torch.arange),
    *(torch.tensor, torch.as_tensor, torch.linspace, torch.eye, torch.randperm, torch.empty_strided, torch.asarray),
    *(torch.logspace, torch.scalar_tensor, torch.normal),
}
NEW = {"new_zeros", "new_empty", "new_ones", "new_full", "new_tensor", "new_empty_strided"}


def as_device(asked: Any) -> torch.device | None:
    if isinstance(asked, torch.device):
        return asked
    if isinstance(asked, str):
        return torch.device(asked)
    return torch.device("cuda", asked) if isinstance(asked, int) and not isinstance(asked, bool) else None


def real(device: torch.device) -> torch.device:
    return CPU if device.type == "cuda" else device


class Functions(TorchFunctionMode):
    """Rewrites devices in calls, and tags what they return."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if func is Tensor.backward or func is torch.autograd.backward:
            return self._backward(args, kwargs)
        if func is Tensor.to:
            return self._to(args, kwargs)
        if func is Tensor.cpu:
            return self._to((args[0], CPU), {})
        if func is Tensor.cuda:
            return self._to((args[0], CUDA), kwargs)
        if name in ("numpy", "__array__") and isinstance(args[0], Tensor):
            return self._numpy(args[0], bool(kwargs.get("force")), name)
        if name == "tolist" and tag(args[0]) == "cuda":
            S.sync("tolist")
        if func is torch.mm and ("out_dtype" in kwargs or len(args) > 2):  # CUDA's alone
            if tag(args[0]) != "cuda":
                S.violations[("mm with out_dtype on the CPU", site())] += 1
            dtype = kwargs.pop("out_dtype", None) or args[2]
            return torch.mm(args[0].to(dtype), args[1].to(dtype))
        wanted = as_device(kwargs["device"]) if kwargs.get("device") is not None else None
        if wanted is not None:
            kwargs["device"] = real(wanted)
        if func in FACTORIES or name in NEW:
            return self._make(func, name, args, kwargs, wanted)
        out = func(*args, **kwargs)
        if wanted is not None and wanted.type in ("cpu", "cuda"):
            for tensor in tree_flatten(out)[0]:
                set_tag(tensor, wanted.type)
        return out

    def _make(self, func: Any, name: str, args: Any, kwargs: Any, wanted: torch.device | None) -> Any:
        pin = kwargs.pop("pin_memory", False)
        where = wanted.type if wanted is not None else "cpu"
        like = args[0] if args and isinstance(args[0], Tensor) else None
        if wanted is None and like is not None and (name in NEW or func in (torch.as_tensor, torch.asarray)):
            where = tag(like)
        S.factories.append(where)
        try:
            out = func(*args, **kwargs)
        finally:
            S.factories.pop()
        set_tag(out, where)
        if where == "cuda" and func in (torch.tensor, torch.as_tensor) and (like is None or tag(like) == "cpu"):
            S.sync("torch.tensor(…, device=cuda)")
        if pin:
            S.pinned[key_of(out) or 0] = StorageWeakRef(storage_of(out))
        return out

    def _numpy(self, tensor: Tensor, force: bool, name: str) -> Any:
        if tag(tensor) == "cuda":
            if not force:
                S.violations[(f"numpy of a CUDA tensor ({name})", site())] += 1
            S.sync("numpy")
        if (key_of(tensor) or 0) in S.in_flight:
            S.hazards[("host memory is read while an asynchronous copy may still write it", site())] += 1
        return Base.numpy(Base.detach(tensor).resolve_conj())

    def _backward(self, args: Any, kwargs: Any) -> None:
        """Run backward under this mode: hooks inside it need it too."""
        given = {**dict(zip(("gradient", "retain_graph", "create_graph", "inputs"), args[1:], strict=False)), **kwargs}
        gradient = given.get("gradient", given.get("grad_tensors"))
        tensors = (args[0],) if isinstance(args[0], Tensor) else tuple(args[0])
        gradients = torch.autograd._tensor_or_tensors_to_tuple(gradient, len(tensors))
        gradients = torch.autograd._make_grads(tensors, gradients, is_grads_batched=False)
        inputs = given.get("inputs")
        inputs = () if inputs is None else (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
        create, keep = bool(given.get("create_graph") or False), given.get("retain_graph")
        with self:
            torch.autograd.graph._engine_run_backward(
                tensors, gradients, create if keep is None else keep, create, inputs,
                allow_unreachable=True, accumulate_grad=True,
            )  # fmt: skip

    def _to(self, args: Any, kwargs: Any) -> Any:
        source, rest, target = args[0], list(args[1:]), None
        if kwargs.get("device") is not None:
            target = as_device(kwargs["device"])
            kwargs["device"] = real(target)  # type: ignore[arg-type]
        for i, asked in enumerate(rest):
            if isinstance(asked, (torch.device, str)):
                target = as_device(asked)
                rest[i] = real(target)  # type: ignore[arg-type]
            elif isinstance(asked, Tensor):
                target = device_of(asked)
        if target is None or target.type not in ("cpu", "cuda") or real_device(source).type != "cpu":
            return Tensor.to(source, *rest, **kwargs)
        if tag(source) == target.type:
            return Tensor.to(source, *rest, **kwargs)
        non_blocking = bool(kwargs.pop("non_blocking", False))
        kwargs.pop("copy", None)
        transfer("to the GPU" if target.type == "cuda" else "from the GPU", source, non_blocking)
        out = Tensor.to(source, *[x for x in rest if not isinstance(x, bool)], **kwargs, copy=True)
        set_tag(out, target.type)
        if target.type == "cpu" and non_blocking:
            S.hazards[("a pageable host copy that may be read before it is there", site())] += 1
        return out


# ---- the dispatch mode: what is computed -----------------------------------------------------------------------------

COPIES = {"aten::copy_", "aten::_to_copy", "aten::set_", "aten::set_data", "aten::_copy_from", "aten::detach"}
INDEXING = {"aten::index", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_", "aten::_unsafe_index"}
SYNCING = {
    "aten::_local_scalar_dense": "item", "aten::nonzero": "nonzero", "aten::equal": "equal",
    "aten::bincount": "bincount", "aten::masked_select": "masked_select", "aten::_unique2": "unique",
    "aten::unique_consecutive": "unique",
    "aten::repeat_interleave": "repeat_interleave", "aten::is_nonzero": "bool",
}  # fmt: skip
POINTWISE = {
    *("aten::where", "aten::fill_", "aten::masked_fill_", "aten::masked_fill", "aten::addcmul", "aten::addcdiv"),
    *("aten::_fused_adamw_", "aten::_fused_adam_"),
}


class Operations(TorchDispatchMode):
    """Holds the tags of each operation's tensors against each other, and hands them on."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name if hasattr(func, "_schema") else str(func)
        tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor) and real_device(t).type == "cpu"]
        on_gpu, on_cpu = ([t for t in tensors if tag(t) == kind] for kind in ("cuda", "cpu"))
        if on_gpu and on_cpu and name not in COPIES:
            self._check(func, name, args, on_cpu)
        if name == "aten::copy_":
            self._copy(args, kwargs)
        elif S.in_flight and any((key_of(t) or 0) in S.in_flight for t in on_cpu) and name != "aten::detach":
            S.hazards[(f"{name} reads host memory while an asynchronous copy may still write it", site())] += 1
        if on_gpu and name in SYNCING:
            S.sync(SYNCING[name])
        if (
            on_gpu
            and name in INDEXING
            and any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in (args[1] or []))
        ):
            S.sync("boolean index")
        if name.startswith("c10d::"):
            S.collectives.append(f"{name} of {sum(tensor.numel() for tensor in tensors)}")
        if name.startswith("c10d::") and on_cpu:
            S.violations[(f"{name} of a CPU tensor: NCCL has none", site())] += 1
        out = func(*args, **kwargs)
        where = "cuda" if on_gpu else "cpu" if on_cpu else "neutral"
        if not tensors and S.factories:
            where = S.factories[-1]
        held = {key_of(t) for t in tensors}
        for t in tree_flatten(out)[0]:
            if isinstance(t, Tensor) and real_device(t).type == "cpu" and key_of(t) not in held:
                set_tag(t, where)
        return out

    def _copy(self, args: Any, kwargs: Any) -> None:
        if not (isinstance(args[0], Tensor) and isinstance(args[1], Tensor)):
            return
        to, source = tag(args[0]), tag(args[1])
        if to == source or "neutral" in (to, source):
            return
        non_blocking = bool(args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        transfer("to the GPU" if to == "cuda" else "from the GPU", args[1], non_blocking)
        if to == "cpu" and non_blocking:
            S.in_flight[key_of(args[0]) or 0] = StorageWeakRef(storage_of(args[0]))
            if not pinned(args[0]):
                S.hazards[("an asynchronous copy into memory that is not pinned", site())] += 1

    def _check(self, func: Any, name: str, args: Any, on_cpu: list[Tensor]) -> None:
        """Count a violation unless CUDA takes these CPU tensors: indices, and numbers in pointwise operations."""
        if name in INDEXING and tag(args[0]) == "cuda":
            indices = {id(index) for index in (args[1] or []) if isinstance(index, Tensor)}
            on_cpu = [t for t in on_cpu if id(t) not in indices]
        pointwise = torch.Tag.pointwise in getattr(func, "tags", ()) or name in POINTWISE
        numbers = pointwise or name in INDEXING or name.startswith("aten::_foreach")
        wrong = [tuple(t.shape) for t in on_cpu if Base.dim(t) or not numbers]
        if wrong:
            S.violations[(f"{name}: CPU tensors of shapes {wrong[:4]} meet CUDA tensors", site())] += 1


# ---- switching it on -------------------------------------------------------------------------------------------------


class Stream:
    def synchronize(self) -> None:
        S.sync("stream.synchronize")


class Properties:
    name, major, minor, multi_processor_count, total_memory = "pretended", 9, 0, 132, 80 << 30
    warp_size, regs_per_multiprocessor, max_threads_per_multi_processor = 32, 65536, 2048


ANSWERS: dict[str, Callable[..., Any]] = {
    "is_available": lambda: True,
    "device_count": lambda: 8,
    "current_device": lambda: 0,
    "is_initialized": lambda: True,
    "_lazy_init": lambda: None,
    "get_device_capability": lambda device=None: (9, 0),
    "get_device_name": lambda device=None: "pretended",
    "get_device_properties": lambda device=None: Properties,
    "is_current_stream_capturing": lambda: False,
    "is_bf16_supported": lambda *_, **__: True,
    "synchronize": lambda device=None: S.sync("torch.cuda.synchronize"),
    "empty_cache": lambda: None,
    "set_device": lambda device: None,
    "mem_get_info": lambda device=None: (70 << 30, 80 << 30),
    "current_stream": lambda device=None: Stream(),
    "get_rng_state": lambda device=None: torch.get_rng_state(),
    "set_rng_state": lambda state, device=None: None,
    "manual_seed": lambda seed: None,
    "manual_seed_all": lambda seed: None,
    "memory_allocated": lambda device=None: 0,
    "max_memory_allocated": lambda device=None: 0,
    "reset_peak_memory_stats": lambda device=None: None,
}


def pin_memory(tensor: Tensor) -> Tensor:
    """Stand in for Tensor.pin_memory, in every thread: it keeps strides, as the real one does."""
    if tag(tensor) == "cuda":
        S.violations[("a CUDA tensor cannot be pinned", site())] += 1
    with torch._C.DisableTorchFunction():
        out = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
        out.copy_(tensor)
    S.pinned[key_of(out) or 0] = StorageWeakRef(storage_of(out))
    return out


def group_of_gloo(begin: Callable[..., None]) -> Callable[..., None]:
    """Return torch's init_process_group with gloo in NCCL's place: the tensors are the CPU's."""

    def begin_with_gloo(backend: str, device_id: torch.device | None = None, **more: Any) -> None:
        assert backend == "nccl"
        assert device_id is not None
        assert device_id.type == "cuda"
        begin("gloo", **more)

    return begin_with_gloo


@contextlib.contextmanager
def cuda() -> Iterator[Seen]:
    """Pretend inside that there is a CUDA device. Everything that was seen before is forgotten."""
    saved: list[tuple[Any, str, Any]] = []
    missing = object()

    def patch(owner: Any, key: str, value: Any) -> None:
        saved.append((owner, key, owner.__dict__.get(key, missing)))
        setattr(owner, key, value)

    def cpu(kind: str) -> str:
        return "cpu" if kind == "cuda" else kind

    for key, answer in ANSWERS.items():
        patch(torch.cuda, key, answer)
    patch(Tensor, "device", property(device_of))
    patch(Tensor, "is_cuda", property(lambda tensor: device_of(tensor).type == "cuda"))
    patch(Tensor, "pin_memory", pin_memory)
    patch(Tensor, "is_pinned", lambda tensor, device=None: pinned(tensor))
    enabled, dtype_of, begin = torch.is_autocast_enabled, torch.get_autocast_dtype, torch.autocast.__init__
    patch(torch, "is_autocast_enabled", lambda kind="cpu": enabled(cpu(kind)))
    patch(torch, "get_autocast_dtype", lambda kind="cpu": dtype_of(cpu(kind)))
    patch(torch.autocast, "__init__", lambda self, kind, *a, **k: begin(self, cpu(kind), *a, **k))
    patch(torch.distributed, "init_process_group", group_of_gloo(torch.distributed.init_process_group))
    patch(torch, "compile", lambda fn=None, **_: fn if fn is not None else (lambda f: f))
    patch(kernels, "COMPILED_FOR", set())  # Triton's kernels need a real GPU
    # Threads have no modes: what is shared out to them is done here, one after the other.
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith(("pgolf_post", "trainer")) and hasattr(module, "map_items"):
            patch(module, "map_items", lambda function, items: iter([function(item) for item in items]))
    S.__init__()  # type: ignore[misc]
    assert threading.current_thread() is threading.main_thread()
    try:
        with Functions(), Operations():
            yield S
    finally:
        for owner, key, value in reversed(saved):
            if value is missing:
                delattr(owner, key)
            else:
                setattr(owner, key, value)
