"""A process among several: the GPU it computes on, the limits of a transfer, and waiting for long work of others."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pgolf_post.base import ranks as module
from pgolf_post.base.rank_variables import Place
from pgolf_post.base.ranks import ALONE, COLLECTIVE_SECONDS, Ranks, use_gpu
from pgolf_post.errors import PgolfError


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Four GPUs, as far as this module asks; the list has those that were made current."""
    current: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(module, "_own_gpu", [])
    return current


def test_a_group_on_gpus_names_its_device_and_its_limit(gpus: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(module, "_joined", [])
    monkeypatch.setattr(module, "place_of_process", lambda: Place(rank=7, world_size=8, local_rank=3))
    monkeypatch.setattr(module, "silence", lambda: None)
    monkeypatch.setattr(module, "_meet", lambda ranks: dist.HashStore())
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **more: asked.update(more, backend=backend))
    ranks = Ranks.join()
    assert asked["backend"] == "nccl"
    assert asked["device_id"] == ranks.device == torch.device("cuda", 3)
    assert asked["timeout"] == timedelta(seconds=COLLECTIVE_SECONDS)
    assert gpus == [3]
    assert ALONE.device == ranks.device  # what this process computes alone is computed there too


def test_a_process_that_was_given_a_gpu_computes_everything_there(gpus: list[int]) -> None:
    assert ALONE.device == torch.device("cuda", 0)
    use_gpu(2)
    assert gpus == [2]
    assert ALONE.device == Ranks().device == torch.device("cuda", 2)


def test_waiting_for_a_rank_that_works_alone_is_no_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.HashStore()
    monkeypatch.setattr(module, "_joined", [store])
    monkeypatch.setattr(module, "_waited", [0])
    monkeypatch.setattr(dist, "barrier", lambda: pytest.fail("a transfer, which ends the run past its limit"))
    store.set("pgolf-post/wait/1/1", "here")
    Ranks(0, 2).wait()
    monkeypatch.setattr(module, "WAIT_SECONDS", 0)
    with pytest.raises(PgolfError, match="rank 0 of 2 waited 0 s"):
        Ranks(0, 2).wait()  # the second time, for which the other has not come
