"""Batches drawn ahead by a thread are the batches of the plain sampler, and lie where a GPU can copy them from."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pgolf_post.base.copying import page_locked
from pgolf_post.data import DataFolder
from trainer.step import batches
from trainer.step.batches import AheadSampler, WindowSampler


@pytest.fixture
def locked(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The tensors that were page-locked, on a machine without a GPU to lock them for."""
    made: list[Tensor] = []

    def pin(tensor: Tensor) -> Tensor:
        made.append(tensor)
        return tensor.clone()

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    monkeypatch.setattr(Tensor, "is_pinned", lambda tensor: any(tensor is one for one in made))
    return made


def test_a_strided_tensor_is_made_contiguous_before_it_is_page_locked(locked: list[Tensor]) -> None:
    windows = torch.arange(12).view(3, 4)
    assert torch.equal(page_locked(windows[:, 1:]), windows[:, 1:])
    assert [tensor.is_contiguous() for tensor in locked] == [True]
    assert page_locked(locked[0]) is locked[0]


@pytest.mark.parametrize("steps", [(0, 1, 2, 3), (5, 6, 2, 3), (4, 4, 4)], ids=["in order", "resumed", "again"])
def test_batches_drawn_ahead_are_those_of_the_step(
    pico_data: DataFolder, locked: list[Tensor], steps: tuple[int, ...]
) -> None:
    plain, ahead = WindowSampler(pico_data, 16, seed=3), AheadSampler(WindowSampler(pico_data, 16, seed=3))
    for step in steps:
        expected = list(plain.step_batches(step, 4, 2))
        found = list(ahead.step_batches(step, 4, 2))
        assert len(found) == len(expected) == 2
        for ours, theirs in zip(found, expected, strict=True):
            assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_an_error_of_the_thread_is_raised_where_the_batch_is_wanted(
    pico_data: DataFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead = AheadSampler(WindowSampler(pico_data, 16, seed=3))
    monkeypatch.setattr(batches, "page_locked", lambda tensor: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        ahead.step_batches(0, 4, 2)
