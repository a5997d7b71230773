"""Parallel work whose results do not depend on the number of threads.

A matrix product split over threads may add its terms in another order, and a weight near the middle between two grid
points then rounds the other way. So each item gets one thread inside the math library, and torch.get_num_threads()
items are worked on at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_items(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Yield the results of `function` in the order of `items`, computed on torch.get_num_threads() threads.

    The first exception is raised here; items not yet started are dropped.
    """
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            yield from pool.map(function, items)
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)  # the workers' setting is also the default of threads yet to start
