"""Several processes, as torchrun starts them, that do one piece of work together. Without it there is one, and nothing here does anything."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from secateur.core.errors import SecateurError
from secateur.core.progress import launched

T = TypeVar("T")


@contextmanager
def processes() -> Iterator[None]:
    """The processes of torchrun know one another inside; also a decorator. Each has an accelerator of its own, where there are any.

    Raises:
        SecateurError: more processes than accelerators.
    """
    if not launched() or dist.is_initialized():
        yield
        return
    if torch.cuda.is_available():
        here, devices = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
        if here > devices:
            raise SecateurError(
                f"torchrun started {here} processes on a machine of {devices} accelerators; "
                f"use --nproc-per-node {devices}"
            )
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def on_first(work: Callable[[], T]) -> T:
    """Do something in the first process alone; its result, or its failure, is that of all."""
    if size() == 1:
        return work()
    told: list[Any] = [None, None]
    failure: Exception | None = None
    if rank() == 0:
        try:
            told[0] = work()
        except Exception as error:  # the others must hear of any
            failure, told[1] = (
                error,
                error if isinstance(error, SecateurError) else SecateurError(f"the first process failed: {error}"),
            )
    dist.broadcast_object_list(told)
    if told[1] is not None:
        raise failure or told[1]
    result: T = told[0]
    return result


def gather(tensor: Tensor) -> list[Tensor]:
    """The tensors of all processes, in their order; of one shape."""
    if size() == 1:
        return [tensor]
    found = [torch.empty_like(tensor) for _ in range(size())]
    dist.all_gather(found, tensor.contiguous())
    return found


def check_same(tensors: Iterable[Tensor], what: str) -> None:
    """Hold that tensors have the same bytes in all processes, by their hash.

    Raises:
        SecateurError: they do not; `what` they are and the processes are named.
    """
    if size() == 1:
        return
    seen = hashlib.sha256()
    for tensor in tensors:
        seen.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    hashes = gather(torch.frombuffer(bytearray(seen.digest()), dtype=torch.uint8))
    if odd := [number for number, one in enumerate(hashes) if not torch.equal(one, hashes[0])]:
        raise SecateurError(
            f"{what} differs between processes 0 and {odd[0]}: their machines or versions do not compute alike; "
            "use equal ones"
        )
