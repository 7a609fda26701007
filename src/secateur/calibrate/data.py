"""Text, and its way into windows of token ids. One vocabulary of names (SPEC) serves calibration and evaluation.

A SPEC is `builtin`, `wikitext2`, `c4`, `alpaca` (hub data sets, resolved by role: the train part to calibrate, the test part to evaluate), or a
path: `.jsonl` or `.json` (one object a line, or a list of them; text, or instructions in Alpaca form), `.parquet`, `.npy` or `.safetensors` (token ids
[samples, seqlen], used as given), and anything else as plain text. Text may be compressed: `.gz`, `.bz2`, `.xz` behind the suffix.
To calibrate there is also `task:NAME+NAME`, the questions of tasks with their right answers, which `evaluate/tasks.py` reads.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import itertools
import json
import lzma
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

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
_JSON_FILES = (".json", ".jsonl", ".ndjson")
_COMPRESSED: dict[str, Callable[[Path], IO[bytes]]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}  # type: ignore[dict-item]  # read as bytes
_OTHER_ARCHIVES = (".zst", ".zip", ".7z", ".tar", ".tgz", ".lz4", ".br")


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
    if _suffix(path) not in (*_JSON_FILES, ".parquet") or name in NAMED:
        raise UsageError(f"'{spec}' holds no instructions with answers: give alpaca, or a .json, .jsonl or .parquet file with 'instruction' and 'output'")
    check_spec(spec)
    rows: Any = _parquet(path).to_pylist() if _suffix(path) == ".parquet" else list(_objects(path))
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


def same_text(spec: str, other: str, file_sha256: str | None = None) -> bool:
    """Whether a SPEC to calibrate with and one to evaluate on stand for the same text.

    Args:
        spec: to calibrate with; of a plan, the name of a file without its folder, and then `file_sha256` is the hash of that file.
        other: to evaluate on.
    """
    name, other_name = spec.partition("@")[0], other.partition("@")[0]
    if name in HUB_TEXTS and name == other_name:
        return HUB_TEXTS[name].split["calibration"] == HUB_TEXTS[name].split["evaluation"]
    one, two = Path(spec).expanduser(), Path(other).expanduser()
    if file_sha256 is not None:
        return one.name == two.name and file_hash(other) == file_sha256
    return one.is_file() and one.resolve() == two.resolve()


def file_hash(spec: str) -> str | None:
    """SHA-256 of the file that a SPEC names; None where it names none."""
    file = Path(spec).expanduser()
    if not file.is_file():
        return None
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def check_ids(windows: Tensor, vocabulary: int, longest: int, spec: str, tokens: int | None = None) -> None:
    """Hold token ids against what a model takes.

    Args:
        windows: token ids, of any shape; the last dimension is a window.
        vocabulary: rows of its embedding.
        longest: positions it knows.
        spec: where the ids come from.
        tokens: how many its tokenizer knows, where it gave them; None where they were given.

    Raises:
        SecateurError: a window is longer, or an id outside the vocabulary.
    """
    if windows.shape[-1] > longest:
        raise SecateurError(f"{spec}: windows of {windows.shape[-1]} tokens, but this model knows at most {longest}; cut them shorter")
    low, high = int(windows.min()), int(windows.max())
    if low < 0 or high >= vocabulary:
        raise outside_vocabulary(low if low < 0 else high, vocabulary, spec, tokens)


def outside_vocabulary(token: int, vocabulary: int, spec: str, tokens: int | None) -> SecateurError:
    """The error for a token id that the embedding has no row for; arguments as for `check_ids`."""
    if tokens is None:
        return SecateurError(f"{spec}: token id {token} is outside the vocabulary of the model (0 to {vocabulary - 1}); tokenise with its own tokenizer")
    return SecateurError(
        f"{spec}: the tokenizer gives id {token}, and the embedding of the model has {vocabulary} rows (ids 0 to {vocabulary - 1}; the tokenizer has {tokens} "
        f"tokens): give the model rows for them (model.resize_token_embeddings({max(tokens, token + 1)}), then save_pretrained), or use the tokenizer it was "
        "trained with"
    )


def calibration_facts(spec: str, windows: Tensor) -> dict[str, Any]:
    """`calibration` of a record: the SPEC, the windows [S, T], the hash of their token ids and, of a file, that of its bytes."""
    facts = {"spec": spec, "samples": len(windows), "seqlen": windows.shape[1], "sha256": ids_hash(windows)}
    return facts if (found := file_hash(spec)) is None else {**facts, "file_sha256": found}


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
    suffix = _suffix(path)
    if suffix in _JSON_FILES:
        return [_row_text(row, field, path) for row in _objects(path)]
    if suffix == ".parquet":
        table = _parquet(path)
        if field not in table.column_names:
            raise SecateurError(f"{path}: has no field '{field}' (it has {', '.join(table.column_names)}); name it with --text-field")
        return [_string(value, field, path) for value in table.column(field).to_pylist()]
    return ["".join(_lines(path))]


def _suffix(path: Path) -> str:
    """That of the text in a file, whether it is compressed or not: `.json` of `c4-train.00000-of-01024.json.gz`."""
    return path.with_suffix("").suffix if path.suffix in _COMPRESSED else path.suffix


def _objects(path: Path) -> Iterator[Any]:
    """The rows of a file of JSON: one a line (C4's shards are so, and end in `.json`), or all in one list, on as many lines as they like."""
    lines = enumerate(_lines(path), 1)
    first = next(((n, line) for n, line in lines if line.strip()), None)
    if first is None:
        return
    if first[1].lstrip("\ufeff \t\r").startswith("["):
        found = _json("".join([first[1], *(line for _, line in lines)]), str(path))
        yield from found
        return
    for number, line in itertools.chain([first], lines):
        if line.strip():
            yield _json(line, f"{path}, line {number}")


def _lines(path: Path) -> Iterator[str]:
    """The lines of a text file with their ends, unpacked where it is compressed; never all of it in memory twice."""
    if path.suffix in _OTHER_ARCHIVES:
        raise SecateurError(f"{path}: {path.suffix} is not read; unpack it first, or give it as {', '.join(_COMPRESSED)}")
    place = 0
    try:
        with _COMPRESSED.get(path.suffix, Path.open)(path, mode="rb") as file:  # type: ignore[call-arg]  # all of them have a mode
            for line in file:
                yield line.decode("utf-8")
                place += len(line)
    except UnicodeDecodeError as error:
        raise SecateurError(f"{path}: not UTF-8 text (byte {place + error.start}); convert it, or give token ids as .npy") from None
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise SecateurError(f"{path}: cannot be unpacked ({error}): it is cut short, or not what its suffix says; download it again") from None


def _row_text(row: Any, field: str, path: Path) -> str:
    """The text of a row: of its field, or of an instruction with its answer."""
    if isinstance(row, dict) and field not in row and _is_instruction(row):
        return alpaca_prompt(row)
    if not isinstance(row, dict) or field not in row:
        has = ", ".join(row) if isinstance(row, dict) else f"a {type(row).__name__}"
        raise SecateurError(f"{path}: a row has no field '{field}' (it has {has}); name it with --text-field")
    return _string(row[field], field, path)


def _in_alpaca_form(rows: Any) -> bool:
    return isinstance(rows, list) and bool(rows) and all(map(_is_instruction, rows))


def _is_instruction(row: Any) -> bool:
    """Whether a row has an instruction and its answer, and text where it has anything."""
    return isinstance(row, dict) and isinstance(row.get("instruction"), str) and isinstance(row.get("output"), str) and isinstance(row.get("input") or "", str)


def _parquet(path: Path) -> Any:
    import pyarrow.parquet as parquet

    try:
        return parquet.read_table(path)
    except Exception as error:
        raise SecateurError(f"{path}: not a parquet file ({error})") from error


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise SecateurError(f"{where}: not JSON ({error.msg})") from None


def _string(value: Any, field: str, path: Path) -> str:
    """A missing text is an empty row."""
    if value is not None and not isinstance(value, str):
        raise SecateurError(f"{path}: the field '{field}' of a row holds a {type(value).__name__}, not text; name the field of the text with --text-field")
    return value or ""


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
            use, option = ("to calibrate on", "--calibration") if role == "calibration" else ("to measure perplexity on", "--text")
            raise SecateurError(
                f"text '{name}', {use}: the hub did not give {source.path} ({why}); check the network, or give a local file: {option} FILE"
            ) from error
