"""Several processes, one run: the transfers of a training step between ranks.

Under `torchrun` every rank holds the whole model (36M parameters are small) and works on its share of each step's
micro-batches. Transfers are begun and waited for apart, so that work goes on in between; `trainer.optim.muon` says how
they are arranged. The global batch, the data order and so the run are the same whatever the number of ranks.

NCCL and gloo both know every operation used here, asynchronous ones included; gloo sums whole stacks to scatter them,
which costs it twice the traffic and changes no result. torchrun's own variables (RANK, WORLD_SIZE, LOCAL_RANK) are the
only environment that is read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pgolf_post.base.ranks import Ranks

# torch 2.13 renamed both and warns of the old names; 2.9, the oldest we run on, knows only those.
REDUCE_SCATTER: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
ALL_GATHER: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass
class Transfer:
    """A tensor on its way between ranks; without `work` it has arrived."""

    result: Tensor
    work: Any = None  # torch's handle
    sent: Tensor | None = None  # held until it has been read

    def wait(self) -> Tensor:
        """Wait for the tensor and return it, as often as called. With NCCL only the device's stream waits."""
        if self.work is not None:
            self.work.wait()  # once: gloo writes the result here, over what may have been done to it since
            self.work = self.sent = None
        return self.result


@dataclass(frozen=True)
class TrainingRanks(Ranks):
    """The toolkit's ranks, and the transfers of a training step between them."""

    def sum_each_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor, in place, by its sum over ranks."""
        self.begin_sum_(tensors)()

    def begin_sum_(self, tensors: Sequence[Tensor]) -> Callable[[], None]:
        """Begin `sum_each_`, one flat transfer per dtype. Call the result once: it waits and writes the sums."""
        if self.world_size == 1 or not tensors:
            return lambda: None
        begun = []
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):  # the same order on every rank
            same = [tensor for tensor in tensors if tensor.dtype == dtype]
            flat = torch.cat([tensor.flatten() for tensor in same])
            begun.append((same, Transfer(flat, dist.all_reduce(flat, async_op=True))))

        def finish() -> None:
            for same, transfer in begun:
                totals = transfer.wait().split([tensor.numel() for tensor in same])
                for tensor, total in zip(same, totals, strict=True):
                    tensor.copy_(total.view_as(tensor))

        return finish

    def reduce_scatter(
        self,
        rows: Tensor,  # (world_size · share, …), contiguous
    ) -> Transfer:  # (share, …)
        """Begin to sum rows over ranks; each rank receives its own share of the sums, in order of rank."""
        if self.world_size == 1:
            return Transfer(rows)
        mine = rows.new_empty(len(rows) // self.world_size, *rows.shape[1:])
        return Transfer(mine, REDUCE_SCATTER(mine, rows, async_op=True), rows)

    def all_gather(
        self,
        rows: Tensor,  # (share, …)
    ) -> Transfer:  # (world_size · share, …)
        """Begin to collect every rank's rows, in order of rank, on all ranks."""
        if self.world_size == 1:
            return Transfer(rows)
        rows = rows.contiguous()
        everyones = rows.new_empty(len(rows) * self.world_size, *rows.shape[1:])
        return Transfer(everyones, ALL_GATHER(everyones, rows, async_op=True), rows)

    def sum_floats(self, *values: float | Tensor) -> tuple[float, ...]:
        """Return the sums of numbers, or of tensors () on this rank's device, over ranks, in one transfer.

        It is the one moment at which a rank waits for its GPU: tensors are not read before the sums are there.
        """
        if self.world_size == 1:
            return tuple(map(float, values))
        totals = torch.stack([torch.as_tensor(value, dtype=torch.float64).to(self.device) for value in values])
        dist.all_reduce(totals)
        return tuple(totals.tolist())

    def main_float(self, value: float) -> float:
        """Return rank 0's number on every rank: clocks differ, decisions must not."""
        if self.world_size == 1:
            return value
        held = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.broadcast(held, src=0)
        return float(held)


SINGLE_PROCESS = TrainingRanks()
