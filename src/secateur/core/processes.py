"""Processes of our own that work for this one."""

from __future__ import annotations

import os
import threading
from multiprocessing import parent_process


def end_with_parent() -> None:
    """To be called in a process that `multiprocessing` started: it ends when its parent does, however that ends.

    Otherwise one whose parent was killed goes on, beside the run that resumes, and then waits for ever.
    """
    threading.Thread(target=_wait, daemon=True).start()


def _wait() -> None:
    if (parent := parent_process()) is not None:
        parent.join()
        os._exit(1)
