"""The device and the dtype of the computation."""

from __future__ import annotations

import torch

from secateur.core.errors import SecateurError, UsageError

_DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(name: str) -> torch.device:
    """The torch device for a name; `auto` takes an accelerator if there is one, else the CPU.

    Raises:
        UsageError: the name is not that of a device.
        SecateurError: the machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"unknown device '{name}' (known: auto, cpu, cuda, cuda:N)") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SecateurError(f"device '{name}': torch sees no CUDA device here; use --device cpu")
    return device


def resolve_dtype(name: str | torch.dtype | None, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The torch dtype for a name; None is `auto`, and a dtype stays as it is.

    `auto` is the checkpoint's own dtype on an accelerator, and at least float32 on a CPU: products of 16-bit floats are
    slow on most CPUs, and float32 gives the same masks on all of them.

    Raises:
        UsageError: the name is unknown.
    """
    if isinstance(name, torch.dtype):
        return name
    if name in ("auto", None):
        return torch.float32 if device.type == "cpu" and stored in (torch.bfloat16, torch.float16) else stored
    if name not in _DTYPES:
        raise UsageError(f"unknown dtype '{name}' (known: auto, {', '.join(_DTYPES)})")
    return _DTYPES[name]
