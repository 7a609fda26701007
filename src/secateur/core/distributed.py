"""Several processes, started by torchrun, that share one piece of work. Without torchrun nothing here has an effect.

`core/torchrun.py` refuses the work that cannot be shared.
"""

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
from secateur.core.torchrun import launched

T = TypeVar("T")


@contextmanager
def processes() -> Iterator[None]:
    """Connect the processes of torchrun for the length of a `with` statement. Each uses its own accelerator.

    Raises:
        SecateurError: the machine has fewer accelerators than processes.
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
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def on_first(work: Callable[[], T]) -> T:
    """Do something in the first process alone; all processes return its result, or raise its error."""
    if size() == 1:
        return work()
    result_and_error: list[Any] = [None, None]
    failure: Exception | None = None
    if rank() == 0:
        try:
            result_and_error[0] = work()
        except Exception as error:  # any failure must reach the other processes
            failure, result_and_error[1] = (
                error,
                error if isinstance(error, SecateurError) else SecateurError(f"the first process failed: {error}"),
            )
    dist.broadcast_object_list(result_and_error)
    if result_and_error[1] is not None:
        raise failure or result_and_error[1]
    result: T = result_and_error[0]
    return result


def gather(tensor: Tensor) -> list[Tensor]:
    """The tensors of all processes, in the order of their ranks; they must have one shape."""
    if size() == 1:
        return [tensor]
    gathered = [torch.empty_like(tensor) for _ in range(size())]
    dist.all_gather(gathered, tensor.contiguous())
    return gathered


def check_same(tensors: Iterable[Tensor], what: str) -> None:
    """Check, by a hash, that tensors have the same bytes in all processes.

    Args:
        tensors: the tensors.
        what: their name in the error message.

    Raises:
        SecateurError: the bytes differ; the message names the processes.
    """
    if size() == 1:
        return
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    hashes = gather(torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8))
    if odd := [number for number, other in enumerate(hashes) if not torch.equal(other, hashes[0])]:
        raise SecateurError(
            f"{what} differs between processes 0 and {odd[0]}: their machines or versions do not compute alike; "
            "use equal ones"
        )
