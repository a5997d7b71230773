"""Several processes, one result: what the toolkit's ranks share under torchrun.

A stage that runs on many ranks gives each a share of the work and adds up the sums; only rank 0 writes and speaks. The
result does not depend on how many there are. torchrun's own variables (RANK, WORLD_SIZE, LOCAL_RANK) are the only
environment that is read.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NoReturn, Self

import torch
import torch.distributed as dist
from torch import Tensor

from pgolf_post.base.progress import silence
from pgolf_post.errors import SettingsError


@dataclass(frozen=True)
class Ranks:
    """This process's place among the others. The default is one process, in which every method is local."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @classmethod
    def join(cls) -> Self:
        """Join the process group that torchrun describes: NCCL where every rank has a GPU, else gloo.

        Ranks beside the first fall silent. Raises SettingsError if a rank has no GPU of its own on a GPU machine.
        """
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        if world_size == 1:
            return cls()
        ranks = cls(int(os.environ["RANK"]), world_size, int(os.environ["LOCAL_RANK"]))
        if not ranks.is_main:
            silence()
        if torch.cuda.is_available():
            num_gpus = torch.cuda.device_count()
            if ranks.local_rank >= num_gpus:
                raise SettingsError(
                    f"rank {ranks.rank} has no GPU of its own: local rank {ranks.local_rank}, {num_gpus} GPUs here",
                    hint=f"torchrun --nproc_per_node={num_gpus}",
                )
            torch.cuda.set_device(ranks.local_rank)
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        return ranks

    def leave(self) -> None:
        """Leave the process group, if there is one: together, unless an error is on its way out.

        A rank that is gone while another still works can bring down gloo's threads in the one that stays.
        """
        if self.world_size > 1 and dist.is_initialized():
            if sys.exc_info()[0] is None:
                dist.barrier()
            dist.destroy_process_group()

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and talks to the terminal."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """The device this rank computes on."""
        return torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")

    def sum_(self, tensor: Tensor) -> None:
        """Replace a tensor, in place, by its sum over ranks."""
        if self.world_size > 1:
            dist.all_reduce(tensor)

    def maximum_(self, tensor: Tensor) -> None:
        """Replace a tensor, in place, by its elementwise maximum over ranks."""
        if self.world_size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX)

    def gather(self, rows: Tensor) -> Tensor:  # (k, …) on each → (Σ k, …)
        """Every rank's rows, which may be of different numbers, in the order of ranks."""
        if self.world_size == 1:
            return rows
        counts = torch.zeros(self.world_size, dtype=torch.int64, device=rows.device)
        counts[self.rank] = len(rows)
        self.sum_(counts)
        first = int(counts[: self.rank].sum())
        everyones = rows.new_zeros((int(counts.sum()), *rows.shape[1:]))
        everyones[first : first + len(rows)] = rows
        self.sum_(everyones)
        return everyones

    def main_says(self, value: Any) -> Any:
        """Rank 0's value (plain JSON) on every rank: whether a file is there must not be judged twice."""
        if self.world_size == 1:
            return value
        told = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8, device=self.device)
        length = torch.tensor([len(told)], device=self.device)
        dist.broadcast(length, src=0)
        held = told if self.is_main else told.new_zeros(int(length))
        dist.broadcast(held, src=0)
        return json.loads(bytes(held.tolist()))

    def share(self, items: Iterable[int]) -> list[int]:
        """This rank's part of a list that all ranks hold alike: every world_size-th item."""
        return list(items)[self.rank :: self.world_size]

    def wait(self) -> None:
        """Until every rank is here."""
        if self.world_size > 1:
            dist.barrier()


ALONE = Ranks()  # one process


def end_process(code: int) -> NoReturn:
    """End a rank whose work is done. gloo's threads can abort the interpreter's own way out, so it is not taken."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
