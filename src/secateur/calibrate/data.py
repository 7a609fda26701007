"""Text, and its way into windows of token ids. One vocabulary of names (SPEC) serves calibration and evaluation.

A SPEC is `builtin`, `wikitext2`, `c4`, `alpaca` (hub data sets, resolved by role: the train part to calibrate, the test part to evaluate), or a
path: `.jsonl`, `.json` (Alpaca form), `.parquet`, `.npy` or `.safetensors` (token ids [samples, seqlen], used as given), and anything else as plain text.
To calibrate there is also `task:NAME+NAME`, the questions of tasks with their right answers, which `evaluate/tasks.py` reads.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from secateur.bundled.text import documents
from secateur.core.errors import SecateurError, UsageError
from secateur.core.hub import hub

Role = Literal["calibration", "evaluation"]

# Tokens read for each token wanted, so that windows come from all over a large text without reading all of it.
_READ_AHEAD = 4


@dataclass(frozen=True)
class HubText:
    """A data set of the hub: where it is and which part serves which role."""

    path: str
    config: str | None
    revision: str
    split: dict[Role, str]
    files: dict[Role, str] | None = None
    render: Callable[[dict[str, Any]], str] = lambda row: row["text"]


def alpaca_prompt(row: dict[str, Any]) -> str:
    """An instruction and its answer in the form of the Alpaca project."""
    given = f"\n\n### Input:\n{row['input']}" if row.get("input") else ""
    return f"### Instruction:\n{row['instruction']}{given}\n\n### Response:\n{row['output']}"


HUB_TEXTS = {
    "wikitext2": HubText(
        "Salesforce/wikitext", "wikitext-2-raw-v1", "b08601e04326c79dfdd32d625aee71d232d685c3", {"calibration": "train", "evaluation": "test"}
    ),
    "c4": HubText(
        "allenai/c4",
        None,
        "1588ec454efa1a09f29cd18ddd04fe05fc8653a2",
        {"calibration": "train", "evaluation": "validation"},
        {"calibration": "en/c4-train.00000-of-01024.json.gz", "evaluation": "en/c4-validation.00000-of-00008.json.gz"},
    ),
    "alpaca": HubText(
        "tatsu-lab/alpaca", None, "dce01c9b08f87459cf36a430d809084718273017", {"calibration": "train", "evaluation": "train"}, render=alpaca_prompt
    ),
}
NAMED = ("builtin", *HUB_TEXTS)
TASK = "task:"
IGNORE = -100  # a label that is not to be predicted, as in transformers
_ID_FILES = (".npy", ".safetensors")


class HubRows(Sequence[str]):
    """The rows of a data set as texts, read when asked for: a shard of C4 alone is most of a gigabyte."""

    def __init__(self, data: Any, render: Callable[[dict[str, Any]], str]) -> None:
        self._data, self._render = data, render

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._render(self._data[int(index)])


@dataclass(frozen=True)
class Text:
    """What a SPEC stands for: the rows of a data set (a plain file is one row), or token ids [S, T]. Of a task, `questions` are how the rows begin."""

    spec: str
    rows: Sequence[str] = ()
    ids: Tensor | None = None
    questions: Sequence[str] = ()


def holds_ids(spec: str) -> bool:
    """Whether a SPEC is a file of token ids, which needs no tokenizer."""
    return Path(spec).suffix in _ID_FILES


def check_spec(spec: str) -> None:
    """Raises UsageError where a SPEC to calibrate with is neither a name, nor a file, nor tasks."""
    if spec.startswith(TASK):
        task_names(spec)
    elif spec.partition("@")[0] not in NAMED and not Path(spec).expanduser().is_file():
        raise UsageError(f"no text '{spec}': give one of {', '.join(NAMED)}, or the path of a file")


def task_names(spec: str) -> list[str]:
    """Of `task:NAME+NAME`; of any other SPEC none.

    Raises:
        UsageError: a SPEC of tasks without a name.
    """
    names = [name for name in spec.removeprefix(TASK).split("+") if name] if spec.startswith(TASK) else []
    if spec.startswith(TASK) and not names:
        raise UsageError("--calibration task: names no task; write task:NAME, or task:NAME+NAME")
    return names


def read_text(spec: str, role: Role, *, text_field: str = "text") -> Text:
    """Read a SPEC.

    Args:
        spec: see the module's docstring; a hub name may carry a revision, `wikitext2@REVISION`, instead of the commit it stands for.
        role: which part of a named data set.
        text_field: the field of `.jsonl` and `.parquet` rows that holds the text.

    Raises:
        UsageError: the SPEC is neither a name nor a file.
        SecateurError: the file is not what its suffix says, or holds no text.
    """
    name, _, revision = spec.partition("@")
    if name == "builtin":
        return Text(spec, tuple(d.text for d in documents("train" if role == "calibration" else "test")))
    if name in HUB_TEXTS:
        return Text(spec, _from_hub(name, role, revision or None))
    if spec.startswith(TASK):
        raise UsageError(f"text '{spec}': tasks are for calibration; ask them with --tasks")
    check_spec(spec)
    path = Path(spec).expanduser()
    if holds_ids(spec):
        return Text(spec, ids=_token_ids(path))
    rows = tuple(_rows(path, text_field))
    if not any(row.strip() for row in rows):
        raise SecateurError(f"{spec}: holds no text")
    return Text(spec, rows)


def read_instructions(spec: str) -> Sequence[dict[str, Any]]:
    """Rows with `instruction`, `output` and perhaps `input`, of `alpaca` or a `.json`, `.jsonl` or `.parquet` file.

    Raises:
        UsageError: the SPEC is neither.
        SecateurError: a row lacks one of the fields.
    """
    name, _, revision = spec.partition("@")
    if name == "alpaca":
        return _hub_data(name, "calibration", revision or None)  # type: ignore[no-any-return]  # rows by number
    path = Path(spec).expanduser()
    if path.suffix not in (".json", ".jsonl", ".parquet") or name in NAMED:
        raise UsageError(f"'{spec}' holds no instructions with answers: give alpaca, or a .json, .jsonl or .parquet file with 'instruction' and 'output'")
    check_spec(spec)
    rows: Any
    if path.suffix == ".json":
        rows = _json(_plain(path), str(path))
    elif path.suffix == ".jsonl":
        rows = [_json(line, f"{path}, line {n}") for n, line in enumerate(_plain(path).split("\n"), 1) if line.strip()]
    else:
        rows = _parquet(path).to_pylist()
    if not _in_alpaca_form(rows):
        has = f", its first row has {', '.join(rows[0])}" if isinstance(rows, list) and rows and isinstance(rows[0], dict) else ""
        raise SecateurError(f"{path}: rows need the fields 'instruction' and 'output' (and perhaps 'input'){has}")
    return rows  # type: ignore[no-any-return]


def calibration_windows(text: Text, tokenize: Callable[[str], list[int]], *, samples: int, seqlen: int, seed: int) -> Tensor:
    """The windows of `labelled_windows`."""
    return labelled_windows(text, tokenize, samples=samples, seqlen=seqlen, seed=seed)[0]


def labelled_windows(text: Text, tokenize: Callable[[str], list[int]], *, samples: int, seqlen: int, seed: int) -> tuple[Tensor, Tensor | None]:
    """Windows of calibration text, int64 [S, T], and of questions with answers what is to be predicted: the same, with `IGNORE` in the questions.

    The rows are shuffled and tokenised one after the other (each with what the tokenizer adds at its start) until there is enough; the
    stream is cut into windows that do not overlap, of which `samples` are drawn. Token ids are used as given, in order.

    Raises:
        SecateurError: the text has fewer windows than asked for.
    """
    if text.ids is not None:
        return text.ids, None
    order = np.random.default_rng(seed)
    wanted = samples * seqlen
    stream: list[int] = []
    labels: list[int] = []
    for number in order.permutation(len(text.rows)):
        if text.rows[number].strip():
            ids = tokenize(text.rows[number])
            stream += ids
            if text.questions:
                given = _common(ids, tokenize(text.questions[number])) if text.questions[number] else 0
                labels += [IGNORE] * given + ids[given:]
        if len(stream) >= _READ_AHEAD * wanted:
            break
    there = len(stream) // seqlen
    if there < samples:
        raise SecateurError(
            f"{text.spec}: has {len(stream):,} tokens, {there} windows of {seqlen}, but {samples} are asked for; lower --samples or --seqlen, or give more text"
        )
    drawn = torch.from_numpy(np.sort(order.choice(there, samples, replace=False)))
    windows, labelled = (torch.tensor(tokens[: there * seqlen], dtype=torch.int64).view(-1, seqlen) for tokens in (stream, labels))
    return windows[drawn], labelled[drawn] if text.questions else None


def _common(ids: Sequence[int], begin: Sequence[int]) -> int:
    """With how many tokens both begin; one that joins the end of a question to its answer is the answer's."""
    return next((n for n, (one, other) in enumerate(zip(ids, begin, strict=False)) if one != other), min(len(ids), len(begin)))


def same_text(spec: str, other: str) -> bool:
    """Whether a SPEC to calibrate with and one to evaluate on stand for the same text."""
    name, other_name = spec.partition("@")[0], other.partition("@")[0]
    if name in HUB_TEXTS and name == other_name:
        return HUB_TEXTS[name].split["calibration"] == HUB_TEXTS[name].split["evaluation"]
    return Path(spec).is_file() and Path(spec).expanduser().resolve() == Path(other).expanduser().resolve()


def check_ids(windows: Tensor, vocabulary: int, longest: int, spec: str) -> None:
    """Raises SecateurError where a token id is outside the vocabulary, or a window longer than the model knows."""
    if windows.shape[-1] > longest:
        raise SecateurError(f"{spec}: windows of {windows.shape[-1]} tokens, but this model knows at most {longest}; cut them shorter")
    low, high = int(windows.min()), int(windows.max())
    if low < 0 or high >= vocabulary:
        bad = low if low < 0 else high
        raise SecateurError(f"{spec}: token id {bad} is outside the vocabulary of the model (0 to {vocabulary - 1}); tokenise with its own tokenizer")


def ids_hash(ids: Tensor) -> str:
    """SHA-256 of token ids as little-endian int64."""
    return hashlib.sha256(ids.to(torch.int64).contiguous().numpy().astype("<i8").tobytes()).hexdigest()


def _token_ids(path: Path) -> Tensor:
    try:
        ids = torch.from_numpy(np.load(path, allow_pickle=False)) if path.suffix == ".npy" else next(iter(load_file(path).values()))
    except Exception as error:
        raise SecateurError(f"{path}: cannot be read as token ids ({error})") from error
    if ids.dim() != 2 or ids.is_floating_point() or 0 in ids.shape or ids.shape[1] < 2:
        raise SecateurError(f"{path}: token ids are an int array [samples, seqlen], this is {ids.dtype} {list(ids.shape)}")
    return ids.to(torch.int64)


def _rows(path: Path, field: str) -> Sequence[str]:
    if path.suffix == ".jsonl":
        return [_field(_json(line, f"{path}, line {n}"), field, path) for n, line in enumerate(_plain(path).split("\n"), 1) if line.strip()]
    if path.suffix == ".json":
        rows = _json(_plain(path), str(path))
        if not _in_alpaca_form(rows):
            raise SecateurError(
                f"{path}: .json is read in Alpaca form, a list of objects with 'instruction', 'output' and perhaps 'input'; use .jsonl for other text"
            )
        return [alpaca_prompt(row) for row in rows]
    if path.suffix == ".parquet":
        table = _parquet(path)
        if field not in table.column_names:
            raise SecateurError(f"{path}: has no field '{field}' (it has {', '.join(table.column_names)}); name it with --text-field")
        return [_string(value) for value in table.column(field).to_pylist()]
    return [_plain(path)]


def _in_alpaca_form(rows: Any) -> bool:
    return isinstance(rows, list) and bool(rows) and all(isinstance(row, dict) and {"instruction", "output"} <= row.keys() for row in rows)


def _parquet(path: Path) -> Any:
    import pyarrow.parquet as parquet

    try:
        return parquet.read_table(path)
    except Exception as error:
        raise SecateurError(f"{path}: not a parquet file ({error})") from error


def _plain(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise SecateurError(f"{path}: not UTF-8 text (byte {error.start}); convert it, or give token ids as .npy") from None


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise SecateurError(f"{where}: not JSON ({error.msg})") from None


def _field(row: Any, field: str, path: Path) -> str:
    if not isinstance(row, dict) or field not in row:
        has = ", ".join(row) if isinstance(row, dict) else f"a {type(row).__name__}"
        raise SecateurError(f"{path}: a row has no field '{field}' (it has {has}); name it with --text-field")
    return _string(row[field])


def _string(value: Any) -> str:
    """A missing text is an empty row."""
    return "" if value is None else str(value)


def _from_hub(name: str, role: Role, revision: str | None) -> HubRows:
    return HubRows(_hub_data(name, role, revision), HUB_TEXTS[name].render)


def _hub_data(name: str, role: Role, revision: str | None) -> Any:
    """The rows of a data set, by number."""
    source = HUB_TEXTS[name]
    import datasets

    part = source.split[role]
    files = {part: source.files[role]} if source.files else None
    with hub() as answers:
        try:
            return datasets.load_dataset(source.path, source.config, data_files=files, split=part, revision=revision or source.revision)
        except Exception as error:
            why = error if answers else "it does not answer"
            raise SecateurError(f"text '{name}': the hub did not give {source.path} ({why}); check the network, or give a local file") from error
