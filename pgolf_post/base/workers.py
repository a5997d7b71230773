"""Work in parallel whose results do not depend on how parallel it was.

A matrix product split over threads may add its terms in another order, and a weight near the middle between two grid
points then rounds the other way. So each item is worked on with one thread inside the math library, and as many items
at once as torch was given threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_items(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """The results of `function` in the order of `items`, computed on torch.get_num_threads() threads.

    The first exception is raised here, and items not yet started are dropped.
    """
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            yield from pool.map(function, items)
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)  # the workers' setting is also the default of threads yet to start
