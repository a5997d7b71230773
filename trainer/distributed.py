"""Several processes, one run: what ranks share, and nothing else.

Under `torchrun` every rank holds the whole model (36M parameters are small), works on its share of each step's
micro-batches, and sums gradients with the others; Newton-Schulz, the costly part of Muon, is shared out matrix by
matrix and gathered back. The global batch, the data order and so the run are the same whatever the number of ranks.
torchrun's own variables (RANK, WORLD_SIZE, LOCAL_RANK) are the only environment that is read.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from pgolf_post.errors import SettingsError


@dataclass(frozen=True)
class Ranks:
    """This process's place among the others. The default is a run of one process, in which every method is local."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @classmethod
    def join(cls) -> Ranks:
        """Join the process group that torchrun describes: NCCL where every rank has a GPU, else gloo."""
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        if world_size == 1:
            return cls()
        ranks = cls(int(os.environ["RANK"]), world_size, int(os.environ["LOCAL_RANK"]))
        if torch.cuda.is_available():
            if ranks.local_rank >= torch.cuda.device_count():
                raise SettingsError(
                    f"rank {ranks.rank} has no GPU of its own: local rank {ranks.local_rank}, "
                    f"{torch.cuda.device_count()} GPUs here",
                    hint=f"torchrun --nproc_per_node={torch.cuda.device_count()}",
                )
            torch.cuda.set_device(ranks.local_rank)
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        return ranks

    def leave(self) -> None:
        """Leave the process group, if there is one."""
        if self.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    @property
    def is_main(self) -> bool:
        """Whether this rank writes checkpoints and talks to the terminal."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """The device this rank computes on."""
        return torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor, in place, by its sum over ranks: one flat transfer per dtype."""
        if self.world_size == 1 or not tensors:
            return
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):  # the same order on every rank
            same = [tensor for tensor in tensors if tensor.dtype == dtype]
            flat = torch.cat([tensor.flatten() for tensor in same])
            dist.all_reduce(flat)
            for tensor, total in zip(same, flat.split([tensor.numel() for tensor in same]), strict=True):
                tensor.copy_(total.view_as(tensor))

    def sum_float(self, value: float) -> float:
        """The sum of a number over ranks."""
        if self.world_size == 1:
            return value
        total = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return float(total)

    def main_float(self, value: float) -> float:
        """Rank 0's number, on every rank: clocks differ, decisions must not."""
        if self.world_size == 1:
            return value
        held = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.broadcast(held, src=0)
        return float(held)

    def map_rows(
        self,
        work: Callable[[Tensor], Tensor],
        rows: Tensor,  # (n, …), the same on every rank
    ) -> Tensor:  # (n, …), the same on every rank
        """`work` applied to all rows, each rank doing an equal share. `work` must treat rows independently."""
        if self.world_size == 1:
            return work(rows)
        share = -(-len(rows) // self.world_size)
        padding = rows.new_zeros(share * self.world_size - len(rows), *rows.shape[1:])
        mine = torch.cat([rows, padding])[self.rank * share : (self.rank + 1) * share]
        done = work(mine).contiguous()
        gathered = [torch.empty_like(done) for _ in range(self.world_size)]
        dist.all_gather(gathered, done)
        return torch.cat(gathered)[: len(rows)]

    def wait(self) -> None:
        """Until every rank is here."""
        if self.world_size > 1:
            dist.barrier()


ALONE = Ranks()  # a run of one process
