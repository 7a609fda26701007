"""The items of the built-in cloze task, as lm-eval reads data sets."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from datasets import Dataset

from secateur.evaluate.cloze import cloze_items


def dataset(**_: Any) -> dict[str, Dataset]:
    """The one split of it."""
    return {"test": Dataset.from_list([{**asdict(item), "choices": list(item.choices)} for item in cloze_items()])}
