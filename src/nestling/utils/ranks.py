"""The processes of one run, as torchrun starts them: which one this is, and what they decide together."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout

T = TypeVar("T")
STARTED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun tells each process


class Elsewhere(Exception):
    """What the other ranks raise for an error that the first one raises, and reports."""


class _Value(Elsewhere, ValueError):
    pass


class _System(Elsewhere, OSError):
    pass


@dataclass(frozen=True)
class Ranks:
    """This process (`rank` of `size`; `local` on its machine) and the others. Every method is called by all alike."""

    rank: int = 0
    size: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and speaks."""
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's tensor (on the CPU)."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def mean(self, value: float) -> float:
        """The mean of every rank's number."""
        return value if self.size == 1 else float(self.sum(torch.tensor(value, dtype=torch.float64))) / self.size

    def any(self, flag: bool) -> bool:
        """Whether it holds on some rank."""
        return self.mean(float(flag)) > 0

    def gathered(self, value: T) -> list[T]:
        """Every rank's value, which can be pickled, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def together(self, work: Callable[[], T], only_first: bool = False) -> T:
        """Do some work, without collectives of its own, on every rank or the first; an error anywhere ends it on all.

        Returns:
            This rank's result; with `only_first` the first rank's, which can be pickled.
        """
        result, error = None, None
        if self.first or not only_first:
            try:
                result = work()
            except (ValueError, OSError) as raised:
                if self.size == 1:
                    raise
                error = raised
        found = self.gathered((result if only_first else None, error and (isinstance(error, OSError), str(error))))
        for rank, (_, failure) in enumerate(found):
            if failure:
                system, message = failure
                if not self.first:
                    raise (_System if system else _Value)(message) from error
                raise error or (OSError if system else ValueError)(f"rank {rank}: {message}")
        return found[0][0] if only_first else result  # type: ignore[return-value]


def find_ranks() -> Ranks:
    """The process group that is open here, or a single process."""
    if dist.is_available() and dist.is_initialized():
        return Ranks(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", 0)))
    return Ranks()


def is_first() -> bool:
    """Whether this process is the one that speaks, also before and after the process group is open."""
    return int(os.environ.get("RANK", 0)) == 0 if is_launched() else True


def is_launched() -> bool:
    """Whether torchrun, or something like it, started this process as one of several."""
    return all(name in os.environ for name in STARTED)


@contextmanager
def process_group(device: str) -> Iterator[Ranks]:
    """The ranks torchrun started, connected while it is open: gloo between CPUs, NCCL between GPUs.

    Args:
        device: of the run, as its configuration names it.
    """
    if not is_launched() or dist.is_initialized():
        yield find_ranks()
        return
    gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    store, rank, size = next(dist.rendezvous("env://"))
    backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
    dist.init_process_group(backend, store=_of_this_start(store, rank, size), rank=rank, world_size=size)
    try:
        yield find_ranks()
    finally:
        dist.destroy_process_group()


def _of_this_start(store: dist.Store, rank: int, size: int) -> dist.Store:
    """The store under a name that only the processes of this start have agreed on.

    torchrun keeps one store while it starts processes again. Who comes first there reads the address of one that is
    dead, and gloo waits for it. So the first process names the start, and tells the name to whoever asks it now.
    """
    own, deadline = uuid.uuid4().hex, time.monotonic() + default_pg_timeout.total_seconds()

    def said(key: str) -> str:
        return store.get(key).decode() if store.check([key]) else ""

    def pause() -> None:
        if time.monotonic() > deadline:
            raise OSError(f"not all of {size} processes came within {default_pg_timeout}: start them again")
        time.sleep(0.01)

    if rank == 0:
        others = range(1, size)
        while missing := [i for i in others if said(f"has {i}") != own]:
            for i in missing:
                store.set(f"answer {i}", said(f"asks {i}") + own)
            pause()
        return dist.PrefixStore(own, store)
    store.set(f"asks {rank}", own)
    while not (answer := said(f"answer {rank}")).startswith(own):
        pause()
    name = answer.removeprefix(own)
    store.set(f"has {rank}", name)
    return dist.PrefixStore(name, store)


def rows_of(batch_size: int, rank: int, ranks: int) -> range:
    """The rows of a batch that a process reads. ValueError if they cannot be divided over all."""
    if batch_size % ranks:
        raise ValueError(
            f"batch_size {batch_size} counts the windows of all processes and cannot be divided over {ranks}: "
            f"make it a multiple of {ranks}"
        )
    return range(batch_size // ranks * rank, batch_size // ranks * (rank + 1))
