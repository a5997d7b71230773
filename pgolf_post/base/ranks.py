"""The toolkit's processes under torchrun: several ranks, one result.

A stage that runs on many ranks gives each a share of the work and adds up the sums; only rank 0 writes files and
prints. The result does not depend on the number of ranks. torchrun's own variables (RANK, WORLD_SIZE, LOCAL_RANK,
the master's address) are the only environment variables that are read.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, Self

import click
import torch
import torch.distributed as dist
from torch import Tensor

from pgolf_post.base.progress import silence
from pgolf_post.base.rank_errors import first_error, share, wait_until_seen
from pgolf_post.base.rank_variables import place_of_process
from pgolf_post.errors import PgolfError, SettingsError

JOIN_SECONDS = 300  # for all ranks to come; model and data are loaded afterwards
COLLECTIVE_SECONDS = 900  # for one transfer between ranks; NCCL's own limit of 600 is taken for no reason of ours
WAIT_SECONDS = 6 * 3600  # for a rank that works alone while the others wait: rank 0 scores whole texts
SAY_SECONDS = 5.0
ALL_RANKS = "start every rank with the same MASTER_ADDR, MASTER_PORT and WORLD_SIZE; torchrun does"

_joined: list[dist.Store] = []  # the group's store; not empty: this process is or was one of several
_waited: list[int] = [0]  # how often this process has waited for all others
_own_gpu: list[int] = []  # the GPU that this process was given, where that is not the one of its local rank


@dataclass(frozen=True)
class Ranks:
    """This process's place in its group. The default is a group of one, in which no method communicates."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @classmethod
    def join(cls) -> Self:
        """Join the process group that torchrun describes: NCCL where every rank has a GPU, else gloo.

        All ranks but the first print nothing from here on. Raises SettingsError if the variables do not fit together
        or a GPU machine has fewer GPUs than local ranks, PgolfError if a rank does not come in JOIN_SECONDS or fails at
        once.
        """
        place = place_of_process()
        ranks = cls(place.rank, place.world_size, place.local_rank)
        if ranks.world_size == 1:
            return ranks
        if not ranks.is_main:
            silence()
        if torch.cuda.is_available():
            num_gpus = torch.cuda.device_count()
            if ranks.local_rank >= num_gpus:
                raise SettingsError(
                    f"rank {ranks.rank} has no GPU of its own: local rank {ranks.local_rank}, {num_gpus} GPUs here",
                    hint=f"torchrun --nproc_per_node={num_gpus}",
                )
            use_gpu(ranks.local_rank)
        store = _meet(ranks)
        backend, device = ("nccl", ranks.device) if torch.cuda.is_available() else ("gloo", None)
        try:
            dist.init_process_group(
                backend,
                store=store,
                rank=ranks.rank,
                world_size=ranks.world_size,
                timeout=timedelta(seconds=COLLECTIVE_SECONDS),
                device_id=device,  # NCCL then connects at once, on this GPU
            )
        except RuntimeError:
            first = first_error(store)  # of a rank that came, failed and left while this one was connecting
            if first is None:
                raise
            wait_until_seen(store, ranks.rank, ranks.world_size)
            raise first from None
        _joined.append(store)
        return ranks

    def leave(self) -> None:
        """Leave the process group, if there is one, after waiting for the other ranks unless an exception is raised.

        A rank that ends while another still works can bring down gloo's threads in the other. Call it in a `finally`:
        where a rank has failed, all of them raise the error of the first (see `rank_errors`).
        """
        if self.world_size == 1 or not dist.is_initialized():
            return
        error, broken = sys.exc_info()[1], None
        if error is None:
            try:
                self.wait()
            except (RuntimeError, PgolfError) as breaking:
                error = broken = breaking
        store = _joined[-1] if _joined else None  # none where another program made the group
        first = share(store, self.rank, error) if error is not None and store is not None else None
        dist.destroy_process_group()
        if error is not None and store is not None:
            wait_until_seen(store, self.rank, self.world_size)
        if first is not None and str(first) != str(error):  # else it is on its way already
            raise first from error
        if broken is not None:
            raise broken

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and prints."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """The device this rank computes on."""
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", _own_gpu[0] if _own_gpu else self.local_rank)

    def sum_(self, tensor: Tensor) -> None:
        """Replace a tensor, in place, by its sum over ranks."""
        if self.world_size > 1:
            dist.all_reduce(tensor)

    def maximum_(self, tensor: Tensor) -> None:
        """Replace a tensor, in place, by its elementwise maximum over ranks."""
        if self.world_size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX)

    def gather(self, rows: Tensor) -> Tensor:  # (k, …) on each → (Σ k, …)
        """Return every rank's rows in the order of ranks; ranks may have different numbers of rows."""
        if self.world_size == 1:
            return rows
        counts = torch.zeros(self.world_size, dtype=torch.int64, device=rows.device)
        counts[self.rank] = len(rows)
        self.sum_(counts)
        first = int(counts[: self.rank].sum())
        gathered = rows.new_zeros((int(counts.sum()), *rows.shape[1:]))
        gathered[first : first + len(rows)] = rows
        self.sum_(gathered)
        return gathered

    def main_says(self, value: Any) -> Any:
        """Return rank 0's value (plain JSON) on every rank, so that all of them act on the same state of the disk."""
        if self.world_size == 1:
            return value
        message = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8, device=self.device)
        length = torch.tensor([len(message)], device=self.device)
        dist.broadcast(length, src=0)
        received = message if self.is_main else message.new_zeros(int(length))
        dist.broadcast(received, src=0)
        return json.loads(bytes(received.tolist()))

    def share(self, items: Iterable[int]) -> list[int]:
        """Return this rank's share of a list that is the same on all ranks: every world_size-th item."""
        return list(items)[self.rank :: self.world_size]

    def wait(self) -> None:
        """Wait until every rank has called this, at most WAIT_SECONDS: the others may have long work to do alone.

        The wait is for the group's store, not a transfer, which would be given up after COLLECTIVE_SECONDS.
        """
        if self.world_size == 1:
            return
        if not _joined:  # the group was made elsewhere
            dist.barrier()
            return
        _waited[0] += 1
        come = [f"pgolf-post/wait/{_waited[0]}/{rank}" for rank in range(self.world_size)]
        _joined[-1].set(come[self.rank], "here")
        deadline, pause = time.monotonic() + WAIT_SECONDS, 0.001
        while not _joined[-1].check(come):
            first = first_error(_joined[-1])
            if first is not None and not _joined[-1].check(come):  # it is not one that came after this wait
                raise first
            if time.monotonic() > deadline:
                raise PgolfError(
                    f"rank {self.rank} of {self.world_size} waited {WAIT_SECONDS:,} s for the others and gave up",
                    hint="see what the other ranks printed last",
                )
            time.sleep(pause)
            pause = min(2 * pause, 0.1)


ALONE = Ranks()  # one process


def use_gpu(index: int) -> None:
    """Make a GPU this process's own: whatever it computes alone, in whichever thread, is computed there."""
    torch.cuda.set_device(index)
    _own_gpu[:] = [index]


def has_joined() -> bool:
    """Return whether this process is or was one of several."""
    return bool(_joined)


def _meet(ranks: Ranks) -> dist.Store:
    """Return the group's key-value store once all ranks have come. Raises PgolfError that names those that have not."""
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        return _meet_at(ranks, where)
    except (RuntimeError, ValueError) as error:  # torch's store: the address is taken, unknown or silent
        raise PgolfError(
            f"rank {ranks.rank} of {ranks.world_size} waited for rank 0 at {where} (MASTER_ADDR:MASTER_PORT), at most "
            f"{JOIN_SECONDS} s: {str(error).splitlines()[0]}",
            hint=ALL_RANKS,
        ) from error


def _meet_at(ranks: Ranks, where: str) -> dist.Store:
    """Announce this rank in the store, then wait for the others."""
    timeout = timedelta(seconds=JOIN_SECONDS)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun keeps the store
        store = next(iter(dist.rendezvous("env://", ranks.rank, ranks.world_size, timeout=timeout)))[0]
    else:
        host, _, port = where.rpartition(":")
        store = dist.TCPStore(host, int(port), ranks.world_size, ranks.is_main, timeout, wait_for_workers=False)
    store.set(f"pgolf-post/{ranks.rank}", "here")
    deadline, said = time.monotonic() + JOIN_SECONDS, False
    while away := [rank for rank in range(ranks.world_size) if not store.check([f"pgolf-post/{rank}"])]:
        waiting = f"rank {ranks.rank} of {ranks.world_size} at {where} waits for rank {', '.join(map(str, away))}"
        if time.monotonic() > deadline:
            raise PgolfError(f"{waiting}; gave up after {JOIN_SECONDS} s", hint=ALL_RANKS)
        if not said and time.monotonic() > deadline - JOIN_SECONDS + SAY_SECONDS:
            click.echo(f"{waiting}, for at most {JOIN_SECONDS} s", err=True)
            said = True
        time.sleep(0.05)
    return store


def end_process(code: int) -> NoReturn:
    """End this process at once with an exit code: gloo's threads can abort the interpreter's regular shutdown."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
