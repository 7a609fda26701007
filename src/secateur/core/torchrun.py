"""Under torchrun: whether this is one of several processes, and the refusal of work that they cannot share.

`core/distributed.py` has what they need to share work. This module does without torch, so that a refusal is quick.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from secateur.core.errors import UsageError


def launched() -> bool:
    """Whether torchrun started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def speaks() -> bool:
    """Whether this process prints messages: among several processes only the first does."""
    return not launched() or os.environ["RANK"] == "0"


def refuse_command() -> None:
    """Refuse, under torchrun, a command that works in one process.

    Raises:
        UsageError: torchrun started this process.
    """
    if launched():
        raise UsageError(
            "torchrun: only `secateur prune` can use several processes, and not with --dry-run; start this command "
            "without it"
        )


def refuse_pruning(method: str, instead: Sequence[str] | None, *, nothing: bool, device: str) -> None:
    """Refuse, before any work, a run of `prune` that several processes cannot share.

    Args:
        method: the name of the method.
        instead: the names of the methods whose work can be shared, if that of `method` cannot; else None.
        nothing: whether nothing is to be removed.
        device: the value of `--device`.

    Raises:
        UsageError: the method or the sparsity works in one process only, or `device` is one device for all processes.
    """
    if instead is not None:
        raise UsageError(
            f"torchrun: {method} works in one process (several can share: {', '.join(instead)}); start it without "
            "torchrun"
        )
    if nothing:
        raise UsageError("torchrun: at sparsity 0 there is nothing to share among processes; start it without torchrun")
    if ":" in device:
        raise UsageError(
            f"torchrun: --device {device} is one device for all processes; use --device {device.partition(':')[0]}"
        )
