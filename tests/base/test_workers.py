"""Parallel work: results in order, errors raised, torch's threads as they were."""

from __future__ import annotations

import threading

import pytest
import torch

from pgolf_post.base.workers import map_items


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_results_keep_their_order_and_each_item_has_one_thread(threads: int) -> None:
    results = list(map_items(lambda item: (item, torch.get_num_threads()), range(20)))
    assert results == [(item, 1) for item in range(20)]
    assert torch.get_num_threads() == threads


def test_as_many_items_at_once_as_threads(threads: int) -> None:
    meeting = threading.Barrier(threads, timeout=30)
    assert list(map_items(lambda item: meeting.wait() >= 0, range(threads))) == [True] * threads


def test_the_first_error_is_raised_and_threads_are_restored(threads: int) -> None:
    def work(item: int) -> int:
        if item == 3:
            raise ValueError(f"item {item}")
        return item

    with pytest.raises(ValueError, match="item 3"):
        list(map_items(work, range(1000)))
    assert torch.get_num_threads() == threads
