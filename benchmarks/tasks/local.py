"""Reads the data files of the tasks in this folder, which lie under the folder that SECATEUR_DATA names.

The prompts are those of lm-eval's tasks of the same names, so the requests are equal if the file holds the same items.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset

Row = dict[str, Any]


def _choices(row: Row) -> Row:
    return {"query": row["query"], "choices": row["choices"], "gold": row["gold"]}


def _boolq(row: Row) -> Row:
    return {"query": row["query"].removeprefix("Passage: "), "choices": row["choices"], "gold": row["gold"]}


def _hellaswag(row: Row) -> Row:
    from lm_eval.tasks.hellaswag.utils import preprocess

    context = f"{row['ctx_a']} {row['ctx_b'].capitalize()}"
    return {
        "query": preprocess(f"{row['activity_label']}: {context}"),
        "choices": [preprocess(e) for e in row["endings"]],
        "gold": int(row["label"]),
    }


def _winogrande(row: Row) -> Row:
    return {"contexts": row["context_options"], "continuation": row["continuation"], "gold": row["gold"]}


def _rte(row: Row) -> Row:
    return {
        "query": f"{row['sentence1']}\nQuestion: {row['sentence2']} True or False?",
        "choices": ["True", "False"],
        "gold": int(row["label"]),
    }


def _lambada(row: Row) -> Row:
    return {"context": row["context"], "continuation": row["continuation"]}


SHAPES: dict[str, Callable[[Row], Row]] = {
    "choices": _choices,
    "boolq": _boolq,
    "hellaswag": _hellaswag,
    "winogrande": _winogrande,
    "rte": _rte,
    "lambada": _lambada,
}


def dataset(file: str, shape: str, **_: Any) -> dict[str, Dataset]:
    """The one split of a task: `file` under SECATEUR_DATA, its rows in the shape that the task file reads."""
    folder = os.environ.get("SECATEUR_DATA")
    if not folder:
        raise FileNotFoundError(f"the environment variable SECATEUR_DATA must name the folder that holds {file}")
    path = Path(folder) / file
    if not path.is_file():
        raise FileNotFoundError(f"SECATEUR_DATA={folder} holds no {file}")
    return {"test": Dataset.from_list([SHAPES[shape](row) for row in _rows(path)])}


def _rows(path: Path) -> list[Row]:
    lines = path.read_text("utf-8").splitlines()
    if path.suffix == ".tsv":
        return list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    return [json.loads(line) for line in lines]
