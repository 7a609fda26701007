"""The parts that every command shares: turn failures into one line and an exit status, and print results."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

import typer

from secateur.core.errors import SecateurError, UsageError
from secateur.core.progress import say
from secateur.core.torchrun import launched, refuse_command, speaks

if TYPE_CHECKING:
    from rich.console import RenderableType

    from secateur.core.records import Record

FAILED, USAGE, INTERRUPTED = 1, 2, 130
_HEAD_START_SECONDS = 10.0
RESUME = "the same command with --resume continues from here"


@contextmanager
def command(debug: bool, *, resume: str = "nothing was written", several: bool = False) -> Iterator[None]:
    """Run the body of a `with` statement; turn its failures into one line and an exit status.

    Args:
        debug: also show the traceback.
        resume: the second half of the message after an interrupt.
        several: whether torchrun may start the command in several processes.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        if not several:
            refuse_command()
        with _told_when_terminated(resume):
            yield
    except KeyboardInterrupt:
        _stop(f"interrupted; {resume}", INTERRUPTED)
    except Exception as error:
        if debug:
            traceback.print_exc()
        if not speaks():
            _fall_silent(error)
        _stop(_words(error), USAGE if isinstance(error, UsageError) else FAILED)


@contextmanager
def _told_when_terminated(resume: str) -> Iterator[None]:
    """Say what to do next when the process is told to end, as `timeout` and job schedulers do; it then ends as usual.

    torchrun ends its processes that way after a failure, which was said already.
    """
    if launched() or threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, _: object) -> None:
        say(f"terminated; {resume}")
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _fall_silent(error: Exception) -> None:
    """Leave a failure of all processes to the first one, which prints it; print one that concerns this process alone.

    torchrun ends all processes when one has failed, so the first one is let go first.
    """
    if isinstance(error, SecateurError):  # it is the same in all of them
        time.sleep(_HEAD_START_SECONDS)
    else:
        typer.echo(f"process {os.environ['RANK']}: {_words(error)}", err=True)


def _words(error: Exception) -> str:
    if isinstance(error, SecateurError):
        return f"error: {error}"
    import torch

    from secateur.core.memory import is_out_of_memory

    windows, pruning = "use shorter windows (--seqlen, --eval-seqlen)", "when pruning, also fewer --samples or --spill"
    if isinstance(error, torch.OutOfMemoryError):
        return f"error: out of memory on the accelerator; {windows} or --device cpu; {pruning}"
    if is_out_of_memory(error):
        return f"error: out of memory; {windows}; {pruning}"
    first = str(error).strip().splitlines()[0] if str(error).strip() else ""
    return f"error: {type(error).__name__}: {first} (unexpected: --debug shows where; please report it)"


def _stop(line: str, status: int) -> NoReturn:
    say(line)
    raise typer.Exit(status)


def show(*parts: RenderableType) -> None:
    """Print tables and lines for people."""
    from rich.console import Console

    for part in parts:
        Console(emoji=False).print(part)  # "N:M: ..." holds no emoji


def emit(record: Record) -> None:
    """Print one JSON object, the last line of stdout."""
    from secateur.core.records import to_json

    sys.stdout.write(to_json(record) + "\n")
    sys.stdout.flush()


def print_record(record: Record, *, as_json: bool, verbose: bool = False) -> None:
    """Print the answer of a command; the whole record with `as_json` or `verbose`, or where there is no answer."""
    if not speaks():
        return
    if as_json:
        emit(record)
        return
    from secateur.cli.answer import answer
    from secateur.cli.terminal import record_table
    from secateur.cli.texts import sample_parts

    lines = answer(record)
    if verbose or not lines:
        show(record_table(record))
    for line in lines:
        typer.echo(line)
    show(*sample_parts(record))


def print_records(records: list[Record], *, as_json: bool) -> None:
    """Print several records, one row per record."""
    if as_json:
        emit({"records": records})
        return
    from secateur.cli.terminal import runs_table

    show(runs_table(records))


def print_estimates(records: Iterable[Record], *, as_json: bool, verbose: bool = False) -> None:
    """Print the dry runs of several runs as one table; with `verbose` also the answer of each, as it comes."""
    from secateur.cli.answer import answer
    from secateur.cli.estimates import estimates_notes, estimates_table

    found = []
    for record in records:
        found.append(record)
        if verbose and not as_json and (run := record.get("run")) is not None:
            typer.echo(run)
            for line in answer(record):
                typer.echo(f"  {line.replace(' Nothing was written.', '')}")
    if as_json:
        emit({"records": found})
        return
    show(estimates_table(found))
    for line in estimates_notes(found):
        typer.echo(line)
