"""Memory that was freed, given back to the system."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import torch


def give_back() -> None:
    """Let go of what the allocator keeps for later; without it the peak of a streamed run is a third higher. Only glibc can do it."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


class PeakMemory:
    """The most memory that is in use at a time from here on, above what is in use now: of an accelerator what torch allocates there, of a CPU what of the
    process is resident, which only Linux tells."""

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
        """Bytes; None where the system does not tell."""
        if self.device.type != "cpu":
            return torch.accelerator.max_memory_allocated(self.device) - self._before
        return _status_bytes("VmHWM") - self._before if self._resettable else None


def _reset_peak_rss() -> bool:
    """Let the peak of the resident set begin anew."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status_bytes(key: str) -> int:
    """An entry of /proc/self/status; 0 where there is none."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), 0)
