"""Text of models for the terminal: the prompt and what each model wrote, one below the other."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from pathlib import Path

from rich.console import RenderableType
from rich.padding import Padding
from rich.text import Text

from secateur.core.records import Record


def sample_parts(record: Record) -> list[RenderableType]:
    """Return the sample of text in the shift of an evaluation, to print below its table; empty without one."""
    shift = record.get("shift") or {}
    if shift.get("sample") is None:
        return []
    name = Path(str(record.get("out") or record["model"])).name
    return _written(
        "the prompt, from the text of the evaluation",
        shift.get("prompt") or "",
        {name: shift["sample"], _dense(shift.get("against"), name): shift.get("sample_dense") or ""},
    )


def generated_parts(record: Record) -> list[RenderableType]:
    """Return what `generate` prints: each prompt, the text of the model, and that of the dense model."""
    name = Path(record["model"]).name or record["model"]
    names = {"": name} | ({"_dense": _dense(record["dense"], name)} if record["dense"] is not None else {})
    parts: list[RenderableType] = []
    for index, entry in enumerate(record["texts"], start=1):
        heading = "prompt" if len(record["texts"]) == 1 else f"prompt {index} of {len(record['texts'])}"
        texts = {}
        for ending, shown in names.items():
            tokens = entry[f"tokens{ending}"]
            about = [shown, f"{tokens:,} token{'' if tokens == 1 else 's'}"]
            texts[", ".join([*about, "chat"] if record[f"chat{ending}"] else about)] = entry[f"text{ending}"]
        parts += _written(heading, entry["prompt"], texts)
    return parts


def _dense(against: str | None, other: str) -> str:
    """Return the name of the dense model, which must not read like that of the model beside it."""
    name = Path(against or "").name or "dense model"
    return f"{against} (dense)" if name == other else f"{name} (dense)"


def _written(heading: str, prompt: str, texts: Mapping[str, str]) -> list[RenderableType]:
    """Return a prompt and the texts of models, one below the other, each indented under its name.

    Below each other, not side by side: half of 80 columns breaks most lines of code.
    """
    parts: list[RenderableType] = []
    for name, text in {heading: prompt, **texts}.items():
        lines = _printable(text).strip("\n")
        parts += [
            Text(name, style="bold"),
            Padding(Text(lines if lines.strip() else "(no text)"), (0, 0, 1, 2), expand=False),
        ]
    return parts


def _printable(text: str) -> str:
    """Return the text with escapes in place of characters that would move the cursor or colour the terminal."""
    return "".join(
        c if c in "\n\t" or not unicodedata.category(c).startswith("C") else repr(c)[1:-1] for c in text
    ).expandtabs(4)
