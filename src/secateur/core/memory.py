"""Know when memory ran out, give freed memory back to the system, and measure peak memory."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import torch


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out; torch says so on a CPU with a RuntimeError."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def give_back() -> None:
    """Return the memory that the allocator keeps for later use; only glibc can do it.

    Without it the peak of a streamed run is a third higher.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def resident_bytes(device: torch.device) -> int:
    """Return what the process holds in memory now, mostly libraries; 0 on an accelerator, whose memory is its own."""
    return _status_bytes("VmRSS") if device.type == "cpu" else 0


class PeakMemory:
    """The peak of memory use from now on, above the present use.

    On an accelerator it counts the memory that torch allocates. On a CPU it counts the resident set of the process,
    which only Linux reports.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cpu":
            give_back()
            self._resettable = _reset_peak_rss()
            self._before = _status_bytes("VmRSS")
        else:
            torch.accelerator.reset_peak_memory_stats(device)
            self._before = torch.accelerator.memory_allocated(device)

    def peak(self) -> int | None:
        """The peak in bytes; None if the system does not report it."""
        if self.device.type != "cpu":
            return torch.accelerator.max_memory_allocated(self.device) - self._before
        return _status_bytes("VmHWM") - self._before if self._resettable else None


def _reset_peak_rss() -> bool:
    """Reset the peak of the resident set; returns whether that worked."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status_bytes(key: str) -> int:
    """An entry of /proc/self/status in bytes; 0 if it is missing."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), 0)
