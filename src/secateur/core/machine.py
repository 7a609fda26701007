"""Measure how fast this machine is, as a reference for other measured speeds."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor


def synchronize(device: torch.device) -> None:
    """Wait until an accelerator has finished; on a CPU there is nothing to wait for."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


class Machine:
    """The best rates measured so far.

    Other programs may use the machine: call `look` again at each timing, and compare with the best rates.

    Args:
        device, dtype: device and dtype of the products.
        bytes_read: size in bytes of the matrix that is read, larger than the caches.
        size: width of the square matrices that are multiplied.
        clock: returns seconds; on one thread of a busy CPU use `time.process_time`, which counts this process alone.
    """

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        *,
        bytes_read: int = 1 << 28,
        size: int = 1536,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.flops_per_second = self.bytes_per_second = 0.0
        self.clock = clock
        self._device = device
        width = 4096
        self._square_NN = torch.ones(size, size, device=device, dtype=dtype)
        self._matrix_NI = torch.ones(bytes_read // (width * dtype.itemsize), width, device=device, dtype=dtype)
        self._vector_I = torch.ones(width, device=device, dtype=dtype)

    @torch.inference_mode()
    def look(self, seconds: float = 0.1) -> None:
        """Measure the rate of multiplication, and the rate of reading, for `seconds` each.

        Reading is measured by a product of a matrix with a vector: one token reads all weights this way.
        """
        product = best_time(lambda: self._square_NN @ self._square_NN, self._device, seconds, self.clock)
        self.flops_per_second = max(self.flops_per_second, 2 * len(self._square_NN) ** 3 / product)
        read = best_time(lambda: self._matrix_NI @ self._vector_I, self._device, seconds, self.clock)
        self.bytes_per_second = max(self.bytes_per_second, self._matrix_NI.nbytes / read)


@torch.inference_mode()
def matrix_rate(device: torch.device, dtype: torch.dtype, *, size: int = 512, seconds: float = 0.1) -> float:
    """Floating-point operations per second in products of square matrices."""
    a_NN = torch.ones(size, size, device=device, dtype=dtype)
    return 2 * size**3 / best_time(lambda: a_NN @ a_NN, device, seconds)


def best_time(
    work: Callable[[], Tensor], device: torch.device, seconds: float, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Return the shortest time of one call, in seconds, among the calls that fit into `seconds`.

    One call that is not timed goes before them.
    """
    work()
    best, started = float("inf"), clock()
    while clock() - started < seconds:
        synchronize(device)
        before = clock()
        work()
        synchronize(device)
        best = min(best, clock() - before)
    return best
