"""Instructions with answers: a row of data as messages, and messages as text.

The text is what the model's own chat template makes of the messages, or the plain form: that of the Alpaca project
(`### Instruction:`, `### Input:`, `### Response:`), which papers calibrate and heal with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from secateur.core.errors import SecateurError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMS = ("auto", "chat", "plain")
ROLES = ("system", "user", "assistant")
FIELDS = "'instruction' and 'output' (and perhaps 'input'), 'prompt' and 'completion', or 'messages'"
_PAIRS = {"instruction": "output", "prompt": "completion"}

Piece = tuple[str, bool]
"""A part of a text, and whether it is an answer."""


@dataclass(frozen=True)
class Instruction:
    """A row of instruction data.

    Attributes:
        where: its file and line, for messages.
        messages: `role` and `content` of each message.
        plain: the parts of its plain form.
    """

    where: str
    messages: Sequence[Mapping[str, str]]
    plain: Sequence[Piece]


def is_instruction(row: Mapping[str, Any]) -> bool:
    """Whether a row has a field of instruction data."""
    return "messages" in row or any(name in row for pair in _PAIRS.items() for name in pair)


def instruction_of(row: Any, where: str) -> Instruction:
    """Read a row of instruction data.

    Args:
        row: fields `instruction`, `output` and perhaps `input` and `system`; `prompt` and `completion`; or `messages`.
        where: its file and line, for messages.

    Raises:
        SecateurError: a field is missing or is not text, or a message is not one.
    """
    if not isinstance(row, Mapping) or not is_instruction(row):
        has = ", ".join(map(str, row)) if isinstance(row, Mapping) else f"a {type(row).__name__}"
        raise SecateurError(f"{where}: a row of instructions needs the fields {FIELDS} (it has {has})")
    if "messages" in row:
        messages = _messages(row["messages"], where)
        return Instruction(where, messages, _plain(messages))
    question, answer = next(pair for pair in _PAIRS.items() if pair[0] in row or pair[1] in row)
    given = {name: _text(row, name, where) for name in (question, answer)}
    more = {name: _text(row, name, where) for name in ("input", "system") if row.get(name)}
    context = more.get("input", "")
    asked = f"{given[question]}\n\n{context}" if context else given[question]
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": given[answer]}]
    if "system" in more:
        messages.insert(0, {"role": "system", "content": more["system"]})
    return Instruction(where, messages, ((_question(given[question], context), False), (given[answer], True)))


def alpaca_prompt(row: Mapping[str, Any]) -> str:
    """The text of an instruction with its answer, in the form of the Alpaca project."""
    return _question(row["instruction"], row.get("input") or "") + str(row["output"])


def plain_text(found: Instruction) -> str:
    """The plain form of a row."""
    return "".join(text for text, _ in found.plain)


def has_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def chat_text(found: Instruction, tokenizer: PreTrainedTokenizerBase) -> str:
    """A row in the chat template, with the special tokens that the template writes.

    Raises:
        SecateurError: the template refuses the messages.
    """
    return _rendered(found, found.messages, tokenizer)


def chat_pieces(found: Instruction, tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    """A row in the chat template, in parts; an answer is the assistant's words and the token that ends the turn.

    Raises:
        SecateurError: the template refuses the messages, or leaves out words of the assistant.
    """
    text = chat_text(found, tokenizer)
    marks = [token.content for token in tokenizer.added_tokens_decoder.values()]
    pieces: list[Piece] = []
    done = 0
    for number, message in enumerate(found.messages):
        if message["role"] == "assistant":
            begin, end = _answer(found, number, text, done, marks, tokenizer)
            pieces += [(text[done:begin], False), (text[begin:end], True)]
            done = end
    return [*pieces, (text[done:], False)]


def _answer(
    found: Instruction, number: int, text: str, done: int, marks: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> tuple[int, int]:
    """The first and last place of an answer in the text of the whole conversation.

    Templates may trim an answer, put words before it, and write line ends behind the token that ends the turn.
    """
    before = [
        _rendered(found, found.messages[:number], tokenizer, add_generation_prompt=ask)
        for ask in (True, False)
        if number
    ]
    start = max(done, next((len(part) for part in before if text.startswith(part)), 0))
    turn = _rendered(found, found.messages[: number + 1], tokenizer)
    stop = len(turn) if text.startswith(turn) else len(text)
    content = found.messages[number]["content"]
    for words in (content, content.strip()):
        if (begin := text.find(words, start, stop)) >= 0:
            end = begin + len(words)
            ends = [(place, place + len(mark)) for mark in marks if (place := text.find(mark, end, stop)) >= 0]
            return begin, min(ends)[1] if ends else end
    raise SecateurError(
        f"{found.where}: message {number + 1}, of the assistant, is not in the text that the chat template writes, so "
        "its answer cannot be found; use --prompt-form plain"
    )


def _rendered(
    found: Instruction,
    messages: Sequence[Mapping[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    add_generation_prompt: bool = False,
) -> str:
    try:
        return str(
            tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=add_generation_prompt
            )
        )
    except Exception as error:  # a template is a program: it can fail in any way
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise SecateurError(
            f"{found.where}: the model's chat template refuses this row ({reason}); mend it, or use --prompt-form plain"
        ) from error


def _question(instruction: str, context: str) -> str:
    context = f"\n\n### Input:\n{context}" if context else ""
    return f"### Instruction:\n{instruction}{context}\n\n### Response:\n"


def _plain(messages: Sequence[Mapping[str, str]]) -> list[Piece]:
    """The plain form of messages; with one question and one answer it is that of an instruction."""
    pieces: list[Piece] = []
    for number, message in enumerate(messages):
        head = {"system": "", "user": "### Instruction:\n", "assistant": "### Response:\n"}[message["role"]]
        pieces += [("\n\n" * bool(number) + head, False), (message["content"], message["role"] == "assistant")]
    return pieces


def _messages(value: Any, where: str) -> list[Mapping[str, str]]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        has = "empty" if value in ([], "") else f"a {type(value).__name__}"
        raise SecateurError(f"{where}: 'messages' is {has}, not a list of messages with 'role' and 'content'")
    found: list[Mapping[str, str]] = []
    for number, message in enumerate(value, 1):
        place = f"{where}: messages, number {number}"
        if not isinstance(message, Mapping):
            raise SecateurError(f"{place}: is a {type(message).__name__}, not an object with 'role' and 'content'")
        role, content = (_text(message, name, place) for name in ("role", "content"))
        if role not in ROLES:
            raise SecateurError(f"{place}: 'role' is '{role}' (allowed: {', '.join(ROLES)})")
        found.append({"role": role, "content": content})
    return found


def _text(row: Mapping[str, Any], name: str, where: str) -> str:
    if name not in row:
        has = ", ".join(map(str, row))
        raise SecateurError(f"{where}: the field '{name}' is missing (it has {has})")
    if not isinstance(row[name], str):
        kind = "null" if row[name] is None else f"a {type(row[name]).__name__}"
        raise SecateurError(f"{where}: the field '{name}' holds {kind}, not text")
    return str(row[name])
