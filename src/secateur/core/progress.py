"""Progress of long work, on stderr: a bar on a terminal, plain lines otherwise. `progress_to` sends it elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from multiprocessing import parent_process
from typing import TypeVar

from secateur.core.timing import Phases
from secateur.core.torchrun import speaks

T = TypeVar("T")

_LINE_EVERY_SECONDS = 10.0
_QUIET_WORKERS = "SECATEUR_QUIET_WORKERS"  # an environment variable: worker processes inherit it

_receive: Callable[[str], object] | None = None  # what gets every line; None: stderr
_observer: Phases | None = None  # what times every track of a rehearsal, which prints nothing


@contextmanager
def progress_to(receive: Callable[[str], object] | None) -> Iterator[None]:
    """Send progress, notes and warnings to a function instead of stderr, one line a call; None drops them.

    It holds inside the `with` statement, for all threads of this process. Worker processes (of `compare`, and of
    `study_modules` with several jobs) print nothing meanwhile.

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


@contextmanager
def observed(phases: Phases) -> Iterator[None]:
    """Time every track inside the `with` statement, and print nothing meanwhile: this is a rehearsal."""
    global _observer
    before, _observer = _observer, phases
    try:
        yield
    finally:
        _observer = before


def _quiet_worker() -> bool:
    """Return True in a worker process whose parent sends its own progress elsewhere."""
    return _QUIET_WORKERS in os.environ and parent_process() is not None


def track(
    items: Iterable[T], description: str, total: int | None = None, status: Callable[[], str] = str
) -> Iterator[T]:
    """Yield the items and show progress: items done, time left, and the text of `status`.

    `total` defaults to `len(items)`, if the items have a length.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    if _observer is not None:
        yield from _observer.watch(items, description)
    elif not speaks():
        yield from items
    elif sys.stderr.isatty() and _receive is None and not _quiet_worker():
        yield from _bar(items, description, total, status)
    else:
        yield from _lines(items, description, total, status)


def say(line: str) -> None:
    """Print one line for the user on stderr (stdout is for results), or give it to what `progress_to` names."""
    if not speaks() or _observer is not None:
        return
    if _receive is not None:
        _receive(line)
    elif not _quiet_worker():
        print(line, file=sys.stderr, flush=True)


def _bar(items: Iterable[T], description: str, total: int | None, status: Callable[[], str]) -> Iterator[T]:
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
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(description, total=total)
        for item in items:
            yield item
            del item  # it may be a block of a large model: free it before the next one is made
            progress.update(task, advance=1, description=" ".join(filter(None, (description, status()))))


def _lines(items: Iterable[T], description: str, total: int | None, status: Callable[[], str]) -> Iterator[T]:
    started = last_line = time.monotonic()
    done = 0
    for item in items:
        yield item
        del item
        done += 1  # noqa: SIM113  # enumerate would hold the item in its tuple
        now = time.monotonic()
        if now - last_line > _LINE_EVERY_SECONDS:
            last_line = now
            left = f", about {(now - started) / done * (total - done):.0f} s left" if total else ""
            parts = ", ".join(
                filter(None, (f"{done}{f' of {total}' if total else ''}", f"{now - started:.0f} s{left}", status()))
            )
            say(f"{description}: {parts}")
