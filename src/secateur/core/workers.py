"""Worker processes of this process."""

from __future__ import annotations

import os
import threading
from multiprocessing import parent_process
from multiprocessing.queues import SimpleQueue

from secateur.core.progress import send_all_to


def start_work(lines: SimpleQueue[str] | None) -> None:
    """Begin in a process that `multiprocessing` started: end with the parent, and send it the lines for the user.

    Args:
        lines: where they go; None: to stderr.
    """
    end_with_parent()
    if lines is not None:
        send_all_to(lines.put)


def end_with_parent() -> None:
    """End this worker process when its parent ends; call it in a process that `multiprocessing` started.

    Otherwise, after the parent is killed, the worker runs on beside the resumed run, and then waits for ever.
    """
    threading.Thread(target=_wait, daemon=True).start()


def _wait() -> None:
    if (parent := parent_process()) is not None:
        parent.join()
        os._exit(1)
