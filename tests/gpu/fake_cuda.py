"""Peak memory on a GPU that is not there, in GiB, as JSON lines: `python -m tests.gpu.fake_cuda LIBRARY ttt others`.

Fake CUDA tensors have shapes, dtypes and storages, but no numbers: the record model runs at its full size, and a
dispatch mode adds up the bytes of the storages that are alive. `guard.cpp`, built as LIBRARY, makes a CPU build of
torch take such tensors through autograd; it must be loaded before torch is.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


@contextmanager
def making_fake_tensors() -> Iterator[None]:
    """Inside, what is made lies on the fake GPU, tensors of given numbers too: those are made on the CPU and moved."""
    import torch
    from torch.overrides import TorchFunctionMode

    class Moved(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if func is torch.tensor and "device" not in kwargs:
                return func(*args, **kwargs, device="cpu").to("cuda")
            return func(*args, **kwargs)

    with torch.device("cuda", 0), Moved():
        yield


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

    from pgolf_post.base.autocast import autocast_to
    from pgolf_post.families import get_family
    from pgolf_post.score.nats import target_nats
    from pgolf_post.score.session import Session
    from pgolf_post.score.ttt.adapters import Adapters
    from pgolf_post.score.ttt.documents import Document
    from pgolf_post.score.ttt.lora import LoraPass
    from pgolf_post.score.ttt.methods import ttt_protocol
    from pgolf_post.score.ttt.optimizers import make_optimizers

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
        module = record_model()
        settings = ttt_protocol("record-1855", [f"precision={precision}"], {}, 2048)
        step = Unread(module, settings)
        documents = [Document(0, 4096)] * settings.batch_documents  # type: ignore[attr-defined]
        with step.adapters.attached():
            step.score_and_learn(documents, 2048 // settings.chunk_tokens)

    return peak_gib(work)


def record_model() -> Any:
    """Return the record model, its loops on, with fake weights that do not learn."""
    from trainer.model.architecture import GraphState
    from trainer.model.gpt import GolfGPT

    with making_fake_tensors():
        return GolfGPT(record_config(), GraphState(active_loops=2)).requires_grad_(False)


def scoring_peak(kind: str, precision: str) -> float:
    """Return the peak of the batch of a protocol without learning that holds most."""
    import numpy as np
    import torch

    from pgolf_post.score.nats import target_nats
    from pgolf_post.score.plain import BATCH_TOKENS
    from pgolf_post.score.protocols import make_protocol, protocol_spans
    from pgolf_post.score.spans import batches_of, computing_in, fitting, scored_hidden

    def work() -> None:
        module = record_model()
        spans = protocol_spans(make_protocol(kind, {}, 2048, "test"), 4 * BATCH_TOKENS)  # type: ignore[arg-type]
        batches = batches_of(spans, fitting(BATCH_TOKENS, module))
        largest = max(batches, key=lambda batch: len(batch) * batch[0].length)
        assert len(largest) * 2048 >= 32768
        tokens = np.zeros(5 * BATCH_TOKENS, dtype=np.uint16)
        with torch.no_grad(), computing_in(precision, module):  # type: ignore[arg-type]
            target_nats(module, *scored_hidden(module, tokens, largest)).double()

    return peak_gib(work)


def calibration_peak(fisher: bool) -> float:
    """Return the peak of two batches of statistics, the sums of the first held beside the second."""
    import numpy as np

    from pgolf_post.calibrate.collect import Observed
    from pgolf_post.calibrate.sums import Sums
    from pgolf_post.families import get_family

    def work() -> None:
        import torch

        module, family = record_model(), get_family("golf_gpt")
        observed = Observed(module, family.sites(module), family.lookups(module), fisher, autocast=torch.bfloat16)
        windows, sums = observed.batch_windows(2048), Sums(products_in=torch.bfloat16)
        for _ in range(2):
            observed.add_batch(np.zeros((windows, 2048), dtype=np.int64), range(windows), sums)

    return peak_gib(work)


class FakeView:
    """A view whose weights are fake."""

    def __init__(self) -> None:
        from pgolf_post.families import get_family

        self.family, self.module = get_family("golf_gpt"), record_model()
        graph = self.module.graph.model_dump()
        self.config = {"family": "golf_gpt", "model": self.module.config.model_dump(), "graph": graph}
        self.tensors = dict(self.module.state_dict())


def fake_text(windows: int) -> Any:
    import numpy as np

    from pgolf_post.calibrate.text import CalibrationSet

    return CalibrationSet((), np.zeros((windows, 2048), dtype=np.int64))


def kappa_peak() -> float:
    """Return the peak of a divergence: batches as large as they get, the reference's hidden states of all held."""
    import torch

    from pgolf_post.fit.probe import Probe

    def work() -> None:
        probe: Any = Probe(FakeView(), fake_text(64))  # type: ignore[arg-type]
        assert len(probe.batches[0][1]) * 2048 >= 32768
        with torch.no_grad():
            for (_, batch), hidden in zip(probe.batches, probe.hidden, strict=True):
                probe.means(batch, probe.log_probabilities(hidden))

    return peak_gib(work)


def tuning_peak(precision: str) -> float:
    """Return the peak of a step of fine-tuning of every matrix, with a batch as large as a micro-batch gets."""
    import torch

    from pgolf_post.fit.tune import MICRO_TOKENS, MOST_STEPS, TunedModel

    def work() -> None:
        tuned = TunedModel(FakeView(), fake_text(64), MOST_STEPS * MICRO_TOKENS["cuda"], precision)  # type: ignore[arg-type]
        assert tuned.batch == tuned.micro == 8
        matrices = {name: parameter for name, parameter in tuned.parameters.items() if parameter.ndim == 2}
        for parameter in matrices.values():
            parameter.requires_grad_(True)
        (optimizer,) = tuned.optimizers(dict.fromkeys(matrices, 1e-4))
        for _ in range(2):  # moments are there from the first one on
            optimizer.zero_grad(set_to_none=True)
            tuned.backward(torch.zeros(tuned.batch, dtype=torch.int64))
            optimizer.step()

    return peak_gib(work)


def record_config() -> Any:
    """Return the record model's config."""
    from pgolf_post.settings import read_settings
    from trainer.config import Recipe

    recipe = read_settings(Path(__file__).parents[2] / "trainer" / "recipes" / RECORD, Recipe, [])
    return recipe.model_config_for(8192)


def ttt_peaks() -> Iterator[tuple[str, float]]:
    for precision in ("fp32", "bf16"):
        yield f"ttt {precision}", ttt_peak(precision)
    from pgolf_post.score.ttt import lora

    lora.ROW_TOKENS.clear()  # all rows in one forward
    yield "ttt fp32 at once", ttt_peak("fp32")


def other_peaks() -> Iterator[tuple[str, float]]:
    for precision in ("fp32", "bf16"):
        for kind in ("plain", "sliding"):
            yield f"{kind} {precision}", scoring_peak(kind, precision)
        yield f"tuning {precision}", tuning_peak(precision)
    yield "kappa", kappa_peak()
    yield "statistics", calibration_peak(fisher=False)
    yield "statistics with derivatives", calibration_peak(fisher=True)


PEAKS = {"ttt": ttt_peaks, "others": other_peaks}


def main() -> None:
    load_guard(sys.argv[1])
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    # Autocast asks for the first two; fake tensors have no page-locked memory.
    torch.cuda.is_available = lambda: True
    torch.cuda.is_bf16_supported = lambda *_, **__: True
    torch.Tensor.pin_memory = lambda tensor, *_: tensor  # type: ignore[method-assign,assignment,misc]

    with FakeTensorMode(allow_non_fake_inputs=True):
        for kind in sys.argv[2:]:
            for name, gib in PEAKS[kind]():
                print(json.dumps({name: gib}), flush=True)


if __name__ == "__main__":
    main()
