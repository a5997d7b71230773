"""What a compiled step of one block launches and moves, by Inductor's own fusions, counted on the CPU.

The counts of the record model on fake CUDA tensors (`test_step_count.py`) take minutes. Here the same counter takes one
block, in this process: a graph more, a product more, or a kernel that no longer fuses is seen at once. Nothing is
written or run of what Inductor would generate. Fusions for a CPU are not those for a GPU: the numbers are this test's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pgolf_post.data import DataFolder
from tests.conftest import pico_recipe
from tests.gpu.step_count import Count, Inductor
from trainer.optim.compiled_updates import CompiledUpdates
from trainer.optim.muon import Scheme
from trainer.run.loop import Trainer
from trainer.run.warm_up import synthetic_batch
from trainer.step import compiled

pytestmark = pytest.mark.slow

ONE_BLOCK = {"num_layers": 1, "loop_start": 0, "loop_end": 0, "num_loops": 0, "xsa_last_n": 1}


@pytest.fixture
def inductor(monkeypatch: pytest.MonkeyPatch) -> Iterator[Inductor]:
    """The counting backend in Inductor's place."""
    import torch._functorch.config as joint
    import torch._inductor.config as config

    counting = Inductor()
    monkeypatch.setattr(compiled, "COMPILER", counting)
    with config.patch(fx_graph_cache=False, compile_threads=1), joint.patch(enable_autograd_cache=False):
        yield counting


def counted(inductor: Inductor, work: Callable[[], object]) -> Count:
    """Return what the graphs of some work launch and move."""
    inductor.watched, inductor.of_step = True, Count()
    work()
    return inductor.of_step


def test_the_counter_knows_what_a_kernel_reads_and_writes(inductor: Inductor) -> None:
    def scaled_product(x: Tensor, weight: Tensor) -> Tensor:
        return torch.relu(2 * x + 1) @ weight

    x, weight = torch.zeros(128, 512), torch.zeros(512, 256)
    count = counted(inductor, lambda: compiled.own_graphs(scaled_product)(x, weight))
    assert count.launches == {"generated": 1, "library": 1}
    assert count.gigabytes * 1e9 == 2 * 4 * 128 * 512  # float32, read and written once; the product's are not counted


def test_an_update_is_three_products_and_one_small_kernel_an_iteration(inductor: Inductor) -> None:
    gradients, momenta = torch.zeros(2, 16, 32), torch.zeros(2, 16, 32)
    scheme = Scheme("polar_express", torch.bfloat16, steps=2)
    count = counted(inductor, lambda: CompiledUpdates()(gradients, momenta, 0.9, scheme, True))
    assert inductor.graphs == 1
    assert count.launches["library"] == 2 * 3
    assert count.launches["generated"] <= 2 + 3  # momentum and both norms, the division and cast, the last factor


@pytest.mark.skipif(not torch.__version__.startswith("2.13."), reason="counts are those of this torch's Inductor")
def test_a_step_of_one_block_is_one_graph_of_known_products(
    inductor: Inductor, pico_data: DataFolder, tmp_path: Path
) -> None:
    recipe: dict[str, Any] = {
        "run": {"precision": "bf16", "stream": "bf16", "compile": True, "attention": "sdpa"},
        "model": ONE_BLOCK,
    }
    run = Trainer(pico_recipe(pico_data, tmp_path, **recipe))
    batch = synthetic_batch(run.state.data.vocab_size, 2, 16, torch.Generator().manual_seed(0))
    count = counted(inductor, lambda: run.gradients.accumulate([batch]))
    assert inductor.graphs == 1
    # Queries, keys and values are one product; then attention's projection, the MLP's two, and the head: each has two
    # more backward. Attention is one call each way.
    assert count.launches["library"] == 3 * 5 + 2
    assert count.launches["generated"] <= 38
    assert count.gigabytes <= 1.03 * 331e-6
