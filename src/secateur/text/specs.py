"""Texts by name: calibration and evaluation use the same names (SPEC).

A SPEC is one of
- `builtin`, or a data set of the hub: `wikitext2`, `c4`, `alpaca`. Calibration takes the train part, evaluation the
  test part.
- the path of a `.jsonl`, `.json` (one object per line, or a list) or `.parquet` file: rows of text, or of instructions
  with answers (see `text/instructions.py`).
- the path of a `.npy` or `.safetensors` file: token ids [samples, seqlen], used as given.
- any other path: plain text. Text files may be compressed: `.gz`, `.bz2`, `.xz` after the suffix.
- `task:NAME+NAME`, for calibration alone: the questions of tasks with their right answers. `evaluate/tasks.py` reads
  them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from secateur.core.errors import SecateurError, UsageError, unknown
from secateur.core.hub import hub
from secateur.core.memory import is_out_of_memory
from secateur.text.builtin import documents
from secateur.text.files import (
    ID_FILES,
    file_hash,
    holds_rows,
    instructions_of,
    rows_of,
    starts_with_instruction,
    token_ids,
)
from secateur.text.instructions import (
    FIELDS,
    FORMS,
    Instruction,
    alpaca_prompt,
    chat_text,
    has_template,
    instruction_of,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Role = Literal["calibration", "evaluation"]


@dataclass(frozen=True)
class HubText:
    """A data set of the hub: its path, its pinned revision, and the part for each role."""

    path: str
    config: str | None
    revision: str
    split: dict[Role, str]
    files: dict[Role, str] | None = None
    render: Callable[[dict[str, Any]], str] = lambda row: row["text"]


HUB_TEXTS = {
    "wikitext2": HubText(
        "Salesforce/wikitext",
        "wikitext-2-raw-v1",
        "b08601e04326c79dfdd32d625aee71d232d685c3",
        {"calibration": "train", "evaluation": "test"},
    ),
    "c4": HubText(
        "allenai/c4",
        None,
        "1588ec454efa1a09f29cd18ddd04fe05fc8653a2",
        {"calibration": "train", "evaluation": "validation"},
        {"calibration": "en/c4-train.00000-of-01024.json.gz", "evaluation": "en/c4-validation.00000-of-00008.json.gz"},
    ),
    "alpaca": HubText(
        "tatsu-lab/alpaca",
        None,
        "dce01c9b08f87459cf36a430d809084718273017",
        {"calibration": "train", "evaluation": "train"},
        render=alpaca_prompt,
    ),
}
NAMED = ("builtin", *HUB_TEXTS)
TASK = "task:"


class HubRows(Sequence[str]):
    """The rows of a data set as texts, each read only on access: a single shard of C4 is most of a gigabyte."""

    def __init__(self, data: Any, render: Callable[[Any], str]) -> None:
        self._data, self._render = data, render

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._render(self._data[int(index)])


@dataclass(frozen=True)
class Text:
    """The text of a SPEC.

    Attributes:
        spec: the SPEC.
        rows: the rows of a data set; a plain file is one row.
        ids: token ids [S, T] instead of rows.
        questions: for tasks, the beginning of each row; the answer follows it.
    """

    spec: str
    rows: Sequence[str] = ()
    ids: Tensor | None = None
    questions: Sequence[str] = ()


def holds_ids(spec: str) -> bool:
    """Whether a SPEC is a file of token ids, which needs no tokenizer."""
    return Path(spec).suffix in ID_FILES


def check_spec(spec: str) -> None:
    """Raise UsageError if a SPEC for calibration is neither a name, nor a file, nor tasks."""
    if spec.startswith(TASK):
        task_names(spec)
    elif spec.partition("@")[0] not in NAMED and not Path(spec).expanduser().is_file():
        raise UsageError(f"no text '{spec}': give one of {', '.join(NAMED)}, or the path of a file")


def task_names(spec: str) -> list[str]:
    """The task names in `task:NAME+NAME`; empty for any other SPEC.

    Raises:
        UsageError: the SPEC is `task:` without a name.
    """
    names = [name for name in spec.removeprefix(TASK).split("+") if name] if spec.startswith(TASK) else []
    if spec.startswith(TASK) and not names:
        raise UsageError("--calibration task: names no task; write task:NAME, or task:NAME+NAME")
    return names


def read_text(spec: str, role: Role, *, text_field: str = "text") -> Text:
    """Read a SPEC.

    Args:
        spec: see the module's docstring. A hub name may have its own revision: `wikitext2@REVISION`.
        role: decides the part of a named data set.
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
        raise UsageError(f"text '{spec}': tasks are for calibration; to measure on tasks, use --tasks")
    check_spec(spec)
    path = Path(spec).expanduser()
    if holds_ids(spec):
        return Text(spec, ids=token_ids(path))
    rows = tuple(rows_of(path, text_field))
    if not any(row.strip() for row in rows):
        raise SecateurError(f"{spec}: holds no text")
    return Text(spec, rows)


def prompt_form(
    spec: str, asked: str, tokenizer: Callable[[], PreTrainedTokenizerBase], text_field: str | None = "text"
) -> str | None:
    """The form in which rows of instructions become text: `chat`, `plain`, or None where a SPEC holds no instructions.

    Args:
        spec: the SPEC.
        asked: one of `FORMS`. `auto` is the chat template if the tokenizer has one; the named text `alpaca` is plain,
            as in the papers that use it.
        tokenizer: gives the tokenizer of the model; called only for instructions.
        text_field: rows that have this field are text, whatever else they have; None: no row is.

    Raises:
        UsageError: an unknown form, or one that the text or the tokenizer does not have.
    """
    if asked not in FORMS:
        raise unknown("--prompt-form", asked, FORMS)
    name = spec.partition("@")[0]
    named = name in NAMED or spec.startswith(TASK)
    if not (name == "alpaca" or (not named and starts_with_instruction(Path(spec).expanduser(), text_field))):
        if asked != "auto":
            raise UsageError(
                f"--prompt-form {asked}: '{spec}' is not read as instructions, which are rows with {FIELDS}; "
                "leave the option out"
            )
        return None
    if asked == "plain" or (asked == "auto" and name == "alpaca"):
        return "plain"
    if has_template(tokenizer()):
        return "chat"
    if asked == "chat":
        raise UsageError(
            "--prompt-form chat: the tokenizer of the model has no chat template; leave the option out, or give plain"
        )
    return "plain"


def read_in_template(spec: str, tokenizer: PreTrainedTokenizerBase) -> Text:
    """Read instructions as rows in the chat template of a tokenizer; each row is rendered only on access."""
    return Text(spec, HubRows(read_instructions(spec), lambda row: chat_text(row, tokenizer)))


def read_instructions(spec: str) -> Sequence[Instruction]:
    """Read instructions with answers from `alpaca`, or a JSON or parquet file.

    Raises:
        UsageError: the SPEC is neither of these.
        SecateurError: a row is not an instruction; the message names file, line and field.
    """
    name, _, revision = spec.partition("@")
    if name == "alpaca":
        return _HubInstructions(spec, _hub_data(name, "calibration", revision or None))
    path = Path(spec).expanduser()
    if name in NAMED or not holds_rows(path):
        raise UsageError(
            f"'{spec}' holds no instructions with answers: give alpaca, or a .json, .jsonl or .parquet file whose rows "
            f"have {FIELDS}"
        )
    check_spec(spec)
    return instructions_of(path)


class _HubInstructions(Sequence[Instruction]):
    """The rows of a data set of the hub as instructions, each read only on access."""

    def __init__(self, spec: str, data: Any) -> None:
        self._spec, self._data = spec, data

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: Any) -> Any:
        return instruction_of(self._data[int(index)], f"{self._spec}, row {int(index) + 1}")


def same_text(spec: str, other: str, file_sha256: str | None = None) -> bool:
    """Whether a calibration SPEC and an evaluation SPEC stand for the same text.

    Args:
        spec: the calibration SPEC. From a plan it is a file name without its folder; `file_sha256` is then its hash.
        other: the evaluation SPEC.
        file_sha256: the hash of the calibration file, from the plan.
    """
    name, other_name = spec.partition("@")[0], other.partition("@")[0]
    if name in HUB_TEXTS and name == other_name:
        return HUB_TEXTS[name].split["calibration"] == HUB_TEXTS[name].split["evaluation"]
    file, other_file = Path(spec).expanduser(), Path(other).expanduser()
    if file_sha256 is not None:
        return file.name == other_file.name and file_hash(other) == file_sha256
    return file.is_file() and file.resolve() == other_file.resolve()


def _from_hub(name: str, role: Role, revision: str | None) -> HubRows:
    return HubRows(_hub_data(name, role, revision), HUB_TEXTS[name].render)


def _hub_data(name: str, role: Role, revision: str | None) -> Any:
    """The rows of a data set of the hub, by number."""
    source = HUB_TEXTS[name]
    import datasets

    part = source.split[role]
    files = {part: source.files[role]} if source.files else None
    with hub() as answers:
        try:
            return datasets.load_dataset(
                source.path, source.config, data_files=files, split=part, revision=revision or source.revision
            )
        except Exception as error:
            if is_out_of_memory(error):
                raise
            why = error if answers else "it does not answer"
            use, option = (
                ("to calibrate on", "--calibration")
                if role == "calibration"
                else ("to measure perplexity on", "--text")
            )
            raise SecateurError(
                f"text '{name}', {use}: the hub did not give {source.path} ({why}); check the network, "
                f"or give a local file: {option} FILE"
            ) from error
