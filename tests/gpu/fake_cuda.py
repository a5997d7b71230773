"""Peak memory on a GPU that is not there: `python -m tests.gpu.fake_cuda LIBRARY` prints it as JSON, in GiB.

Fake CUDA tensors have shapes, dtypes and storages, but no numbers: the record model runs at its full size, and a
dispatch mode adds up the bytes of the storages that are alive. `guard.cpp`, built as LIBRARY, makes a CPU build of
torch take such tensors through autograd; it must be loaded before torch is.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

GIB = 2**30
RECORD = "record_8xh100.toml"


def load_guard(library: str) -> None:
    """Load torch's libraries and the guard."""
    found = importlib.util.find_spec("torch")
    assert found is not None
    assert found.origin is not None
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(Path(found.origin).parent / "lib" / name), ctypes.RTLD_GLOBAL)
    ctypes.CDLL(library)


def peak_gib(work: Callable[[], object]) -> float:
    """Return the most GiB that storages on the fake GPU, made while `work` ran, held at once."""
    from torch import Tensor
    from torch.multiprocessing.reductions import StorageWeakRef
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_flatten

    alive: dict[int, tuple[StorageWeakRef, int]] = {}
    total = peak = 0

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal total, peak
            out = func(*args, **(kwargs or {}))
            for tensor in tree_flatten(out)[0]:
                if isinstance(tensor, Tensor) and tensor.device.type == "cuda":
                    storage = tensor.untyped_storage()
                    held = alive.get(storage._cdata)
                    if held is None or held[0].expired():
                        total += storage.nbytes() - (held[1] if held else 0)
                        alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
            if total > peak:  # perhaps some have gone since
                for key in [key for key, (reference, _) in alive.items() if reference.expired()]:
                    total -= alive.pop(key)[1]
                peak = max(peak, total)
            return out

    with Count():
        work()
    return peak / GIB


def ttt_peak(precision: str) -> float:
    """Of the step of `record-1855` that holds most: 64 documents, whose windows are as long as they get, all learn."""
    import numpy as np
    import torch
    from torch import Tensor

    from pgolf_post.families import get_family
    from pgolf_post.score.nats import target_nats
    from pgolf_post.score.session import Session
    from pgolf_post.score.ttt.adapters import Adapters
    from pgolf_post.score.ttt.documents import Document
    from pgolf_post.score.ttt.gradients import autocast_to
    from pgolf_post.score.ttt.lora import LoraPass
    from pgolf_post.score.ttt.methods import ttt_protocol
    from pgolf_post.score.ttt.optimizers import make_optimizers
    from trainer.architecture import GraphState
    from trainer.model import GolfGPT

    class Unread(LoraPass):
        """A pass whose nats nobody reads: they have no values."""

        def __init__(self, module: Any, settings: Any) -> None:
            self.module, self.settings, self.session = module, settings, Session(quiet=True)
            self.adapters = Adapters(module, get_family("golf_gpt"), settings)
            self.optimizers, self.optimizer_steps = make_optimizers(self.adapters.trained(), settings), 0

        def tokens(self, documents: list[Document], chunk: int) -> Tensor:
            begin, _, stop = self.window(chunk)
            return torch.zeros(len(documents), stop - begin, dtype=torch.int64, device="cuda")

        @torch.no_grad()
        def commit(self, documents: list[Document], chunk: int, tokens: Tensor, hidden: Tensor) -> None:
            _, first, stop = self.window(chunk)
            with autocast_to(self.device, self.settings.autocast):
                target_nats(self.adapters, hidden, tokens[:, first - stop :].flatten())

        def scored_tokens(self, document: Document, begin: int, stop: int) -> np.ndarray:
            return np.zeros(stop - begin, dtype=np.int64)

    def work() -> None:
        with torch.device("cuda"):
            module = GolfGPT(record_config(), GraphState(active_loops=2)).requires_grad_(False)
        settings = ttt_protocol("record-1855", [f"precision={precision}"], {}, 2048)
        step = Unread(module, settings)
        documents = [Document(0, 4096)] * settings.batch_documents  # type: ignore[attr-defined]
        with step.adapters.attached():
            step.score_and_learn(documents, 2048 // settings.chunk_tokens)

    return peak_gib(work)


def record_config() -> Any:
    """Return the record model's config."""
    from pgolf_post.settings import read_settings
    from trainer.config import Recipe

    recipe = read_settings(Path(__file__).parents[2] / "trainer" / "recipes" / RECORD, Recipe, [])
    return recipe.model_config_for(8192)


def main() -> None:
    load_guard(sys.argv[1])
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    # Autocast asks for these; nothing else here does.
    torch.cuda.is_available = lambda: True
    torch.cuda.is_bf16_supported = lambda *_, **__: True

    with FakeTensorMode(allow_non_fake_inputs=True):
        peaks = {f"ttt {precision}": ttt_peak(precision) for precision in ("fp32", "bf16")}
        from pgolf_post.score.ttt import lora

        lora.ROW_TOKENS.clear()  # all rows in one forward
        peaks["ttt fp32 at once"] = ttt_peak("fp32")
        print(json.dumps(peaks))


if __name__ == "__main__":
    main()
