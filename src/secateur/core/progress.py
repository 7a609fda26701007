"""Progress of long work, on stderr: a bar on a terminal, plain lines otherwise. `progress_to` sends it elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from multiprocessing import parent_process
from typing import TypeVar

from secateur.core.timing import Expected, Phases
from secateur.core.torchrun import speaks
from secateur.core.words import rough_duration_words

T = TypeVar("T")

_LINE_EVERY_SECONDS = 10.0
_STATUS_EVERY_SECONDS = 0.5  # on a bar
_QUIET_WORKERS = "SECATEUR_QUIET_WORKERS"  # an environment variable: worker processes inherit it

_receive: Callable[[str], object] | None = None  # what gets every line; None: stderr
_observer: Phases | None = None  # what times every track of a rehearsal, which prints nothing
_run: _Run | None = None  # the run that is expected to take some seconds; None: each track is told for itself


@contextmanager
def progress_to(receive: Callable[[str], object] | None) -> Iterator[None]:
    """Send progress, notes and warnings to a function instead of stderr, one line a call; None drops them.

    It holds inside the `with` statement, for all threads of this process. The lines of the processes that `compare`
    starts come too; those of `study_modules` with several jobs print nothing meanwhile.

        with api.progress_to(None):
            record = api.prune(request, out)
    """
    global _receive
    before, variable = _receive, os.environ.get(_QUIET_WORKERS)
    _receive = receive if receive is not None else lambda _: None
    os.environ[_QUIET_WORKERS] = "1"
    try:
        yield
    finally:
        _receive = before
        if variable is None:
            os.environ.pop(_QUIET_WORKERS, None)
        else:
            os.environ[_QUIET_WORKERS] = variable


def sent_elsewhere() -> bool:
    """Return True inside `progress_to`."""
    return _receive is not None


def send_all_to(receive: Callable[[str], object]) -> None:
    """Send progress, notes and warnings to a function from now on: for a worker process whose parent shows them."""
    global _receive
    _receive = receive


@contextmanager
def observed(phases: Phases) -> Iterator[None]:
    """Time every track inside the `with` statement, and print nothing meanwhile: this is a rehearsal."""
    global _observer
    before, _observer = _observer, phases
    try:
        yield
    finally:
        _observer = before


class _Run:
    """How far a run is, whose tracks are expected to take some seconds, and what is left of it."""

    _TRUST = 0.05  # of the run: until so much is done, the expectation counts more than what is measured

    def __init__(self, expected: Expected) -> None:
        self.expected, self._started = expected, time.monotonic()
        self._done = dict.fromkeys(expected.tracks, 0.0)  # in times that a track runs

    def note(self, description: str, share: float) -> None:
        """Count a share of the items of a track, of one time that it runs."""
        if description in self._done:
            self._done[description] += share / max(1.0, self.expected.runs.get(description, 1.0))

    def left(self) -> float:
        """The seconds left of the whole run: the expected ones, at the pace of what is done."""
        tracks = self.expected.tracks
        total = sum(tracks.values())
        done = sum(seconds * min(1.0, self._done[name]) for name, seconds in tracks.items())
        trust = self._TRUST * total
        pace = (time.monotonic() - self._started + trust) / (done + trust) if total else 1.0
        return (self.expected.seconds - done * self.expected.seconds / total) * pace if total else 0.0


@contextmanager
def expecting(expected: Expected | None) -> Iterator[None]:
    """Inside the `with` statement, tell what is left of the whole run, not of a track alone; None changes nothing."""
    global _run
    before, _run = _run, None if expected is None else _Run(expected)
    try:
        yield
    finally:
        _run = before


def _left(description: str, total: int | None, more: int) -> float | None:
    """Count what is done; return the seconds left of the whole run, or None if nothing is expected of it."""
    if _run is None:
        return None
    if total:
        _run.note(description, more / total)
    return _run.left()


def _quiet_worker() -> bool:
    """Return True in a worker process whose parent sends its own progress elsewhere."""
    return _QUIET_WORKERS in os.environ and parent_process() is not None


def track(
    items: Iterable[T],
    description: str,
    total: int | None = None,
    status: Callable[[], str] = str,
    worth: Callable[[T], int] = lambda _: 1,
) -> Iterator[T]:
    """Yield the items and show progress: items done, time left, and the text of `status`.

    `total` defaults to `len(items)`, if the items have a length. An item may be worth several of what is counted, as a
    batch is of windows; `total` then counts those.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    if _observer is not None:
        yield from _observer.watch(items, description)
    elif not speaks():
        yield from items
    elif sys.stderr.isatty() and _receive is None and not _quiet_worker():
        yield from _bar(items, description, total, status, worth)
    else:
        yield from _lines(items, description, total, status, worth)


def say(line: str) -> None:
    """Print one line for the user on stderr (stdout is for results), or give it to what `progress_to` names."""
    if not speaks() or _observer is not None:
        return
    if _receive is not None:
        _receive(line)
    elif not _quiet_worker():
        print(line, file=sys.stderr, flush=True)


def _bar(
    items: Iterable[T], description: str, total: int | None, status: Callable[[], str], worth: Callable[[T], int]
) -> Iterator[T]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn() if _run is None else TextColumn("{task.fields[left]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(description, total=total, left="")
        asked, said = -_STATUS_EVERY_SECONDS, ""
        for item in items:
            more = worth(item)
            yield item
            del item  # it may be a block of a large model: free it before the next one is made
            if (now := time.monotonic()) - asked >= _STATUS_EVERY_SECONDS:  # an accelerator may have to be waited for
                asked, said = now, status()
            rest = _left(description, total, more)
            left = "" if rest is None else f"about {rough_duration_words(rest)} left"
            progress.update(task, advance=more, description=" ".join(filter(None, (description, said))), left=left)


def _lines(
    items: Iterable[T], description: str, total: int | None, status: Callable[[], str], worth: Callable[[T], int]
) -> Iterator[T]:
    started = last_line = time.monotonic()
    done = 0
    for item in items:
        more = worth(item)
        yield item
        del item
        done += more
        now, rest = time.monotonic(), _left(description, total, more)
        if now - last_line > _LINE_EVERY_SECONDS:
            last_line = now
            if rest is None and total:
                rest = (now - started) / done * (total - done)
            left = "" if rest is None else f", about {rough_duration_words(rest)} left"
            parts = ", ".join(
                filter(None, (f"{done}{f' of {total}' if total else ''}", f"{now - started:.0f} s{left}", status()))
            )
            say(f"{description}: {parts}")
