"""A process that works for another one ends with it."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import os, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from secateur.core.workers import end_with_parent
pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=end_with_parent)
assert pool.submit(os.getpid).result() != os.getpid()
pool.submit(time.sleep, 100)
print("at work", flush=True)
time.sleep(100)
"""


def test_a_process_ends_when_its_parent_is_killed() -> None:
    process = subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "at work\n"
    process.kill()
    process.communicate(timeout=30)  # the pipe is closed when all that have it are gone
