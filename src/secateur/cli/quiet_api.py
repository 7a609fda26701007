"""`secateur.api`, with transformers kept quiet.

Import this inside a command: torch and transformers take seconds, which `--help` need not wait for.
"""

from __future__ import annotations

from transformers.utils import logging

from secateur import api

__all__ = ["api"]

logging.disable_progress_bar()
