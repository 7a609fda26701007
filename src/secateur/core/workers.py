"""Worker processes of this process."""

from __future__ import annotations

import os
import threading
from multiprocessing import parent_process


def end_with_parent() -> None:
    """End this worker process when its parent ends; call it in a process that `multiprocessing` started.

    Otherwise, after the parent is killed, the worker runs on beside the resumed run, and then waits for ever.
    """
    threading.Thread(target=_wait, daemon=True).start()


def _wait() -> None:
    if (parent := parent_process()) is not None:
        parent.join()
        os._exit(1)
