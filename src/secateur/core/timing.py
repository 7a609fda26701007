"""How long each part of a run took."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")
Clock = Callable[[], float]
"""Returns seconds."""


class WorkClock:
    """A clock that stands still while other programs have the machine: estimates made then are for an idle one.

    It goes on by the lesser of two times: that of the wall, and that of the processors that this process used.
    """

    def __init__(self, wall: Clock = time.perf_counter, work: Clock = time.process_time) -> None:
        self._clocks = wall, work
        self._last = wall(), work()
        self._seconds = 0.0

    def __call__(self) -> float:
        """Return the seconds so far."""
        wall, work = self._clocks
        now = wall(), work()
        self._seconds += min(after - before for after, before in zip(now, self._last, strict=True))
        self._last = now
        return self._seconds


work_seconds = WorkClock()


class Stopwatch:
    """Seconds by name. The time of a nested span is not counted in the outer span.

    Args:
        clock: returns seconds.
    """

    def __init__(self, clock: Clock = time.perf_counter) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._clock = clock
        self._inner = [0.0]

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Add the time of the context to a name."""
        started = self._clock()
        self._inner.append(0.0)
        try:
            yield
        finally:
            spent = self._clock() - started
            self.seconds[name] += spent - self._inner.pop()
            self._inner[-1] += spent

    def rounded(self) -> dict[str, float]:
        """The seconds by name, rounded to milliseconds."""
        return {name: round(value, 3) for name, value in self.seconds.items()}


@dataclass
class Phase:
    """The items of one `progress.track`, of all times that it ran.

    Attributes:
        parent: the description of the track that it runs inside; None outside of all.
        runs: for each time that it ran, the seconds of its items, without those of tracks inside them.
    """

    parent: str | None
    runs: list[list[float]] = field(default_factory=list)


class Phases:
    """The seconds of each `track` of a run, by its description. `progress.observed` passes the tracks to it.

    Args:
        clock: returns seconds. On an accelerator it waits for the work first.

    Attributes:
        phases: the tracks by description.
        outside: the seconds outside of all tracks, once `whole` has ended.
    """

    def __init__(self, clock: Clock = time.perf_counter) -> None:
        self.phases: dict[str, Phase] = {}
        self.outside = 0.0
        self._clock = clock
        self._open: list[str] = []
        self._inner = [0.0]

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Time the run inside a `with` statement."""
        started = self._clock()
        yield
        self.outside = self._clock() - started - self._inner[0]

    def watch(self, items: Iterable[T], description: str) -> Iterator[T]:
        """Yield the items, and note the seconds of each, from the wish for it to the wish for the next one."""
        phase = self.phases.setdefault(description, Phase(self._open[-1] if self._open else None))
        seconds: list[float] = []
        phase.runs.append(seconds)
        iterator = iter(items)
        while True:
            started, depth = self._clock(), len(self._inner)
            self._open.append(description)
            self._inner.append(0.0)
            ended = True
            try:
                for item in iterator:
                    yield item
                    del item  # it may be a block of a large model
                    ended = False
                    break
            finally:
                spent = self._clock() - started
                inner = sum(self._inner[depth:])
                del self._inner[depth:], self._open[depth - 1 :]
                self._inner[-1] += inner if ended else spent
                if not ended:
                    seconds.append(spent - inner)
            if ended:
                return


@dataclass(frozen=True)
class Expected:
    """The expected seconds of a run.

    Attributes:
        outside: the seconds outside of all tracks.
        tracks: description of a track -> the seconds of its items, of all times that it runs.
        runs: description of a track -> how many times it runs.
        rough: whether the work is so small that it was measured once, and cold.
        memory: the bytes that it takes, above those that the process holds before; None where they were not measured.
    """

    outside: float
    tracks: Mapping[str, float] = field(default_factory=dict)
    runs: Mapping[str, float] = field(default_factory=dict)
    rough: bool = False
    memory: float | None = None

    @property
    def seconds(self) -> float:
        """The seconds of the whole run."""
        return self.outside + sum(self.tracks.values())


def line(low: tuple[float, float], high: tuple[float, float], at: float) -> float:
    """Return the value at `at` on the line through two points, which never falls and never rises faster than high."""
    slope = min(max(0.0, (high[1] - low[1]) / (high[0] - low[0])), high[1] / high[0]) if high[0] > low[0] else 0.0
    return high[1] + slope * (at - high[0]) if math.isfinite(slope) else high[1]
