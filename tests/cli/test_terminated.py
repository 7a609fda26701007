"""A process that is told to end says how to go on."""

from __future__ import annotations

import signal
import subprocess
import sys

SCRIPT = """
import os, signal
from secateur.cli.console import command
with command(False, resume="go on with --resume"):
    os.kill(os.getpid(), signal.SIGTERM)
    print("still here")
"""


def test_a_terminated_command_says_how_to_go_on() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGTERM
    assert done.stderr.strip() == "terminated; go on with --resume"
    assert done.stdout == ""
