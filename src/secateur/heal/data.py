"""The data that a pruned model is healed on: windows of text, or instructions with their answers.

Shape letters: S examples, T tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from secateur.core.errors import SecateurError
from secateur.core.names import shown
from secateur.text.instructions import Instruction, Piece, chat_pieces, chat_text, plain_text
from secateur.text.specs import read_instructions
from secateur.text.tokens import tokenize
from secateur.text.windows import IGNORE, common_length

_MARKS = re.compile(r"(\n*### (?:Instruction|Input|Response):\n)")  # of the plain form


@dataclass(frozen=True)
class Examples:
    """Token ids and labels, int64 [S, T] each.

    The label of a token that counts in the loss is its id; all other labels are `IGNORE`.
    """

    ids_ST: Tensor
    label_ST: Tensor

    @property
    def tokens(self) -> int:
        """The number of tokens that count in the loss; the first one of an example is never predicted."""
        return int((self.label_ST[:, 1:] != IGNORE).sum())


def answers_alone(
    spec: str, tokenizer: PreTrainedTokenizerBase, *, samples: int, seqlen: int, seed: int, form: str | None = "plain"
) -> Examples:
    """Read instructions with answers, one per example; only answers and the token that ends each count in the loss.

    Args:
        spec: `alpaca`, or a file of instructions.
        tokenizer: the tokenizer of the model.
        samples: the number of examples to draw.
        seqlen: the most tokens of an example; longer ones are cut off.
        seed: the seed of the draw.
        form: `chat`: in the chat template of the tokenizer; `plain`: in the plain form, with one end-of-text token.

    Raises:
        UsageError: the SPEC is not instruction data.
        SecateurError: fewer than `samples` examples have an answer that begins within `seqlen` tokens.
    """
    instructions = read_instructions(spec)
    rows: list[tuple[list[int], list[int]]] = []
    for number in np.random.default_rng(seed).permutation(len(instructions)):
        ids, labels = example(instructions[int(number)], tokenizer, form)
        if any(label != IGNORE for label in labels[:seqlen]):
            rows.append((ids[:seqlen], labels[:seqlen]))
        if len(rows) == samples:
            break
    if len(rows) < samples:
        raise SecateurError(
            f"{spec}: has {len(rows)} instructions whose answers begin within {seqlen} tokens, "
            f"but {samples} are asked for; lower --samples, or raise --seqlen"
        )
    longest = max(len(ids) for ids, _ in rows)
    # Padding follows the tokens that count, and causal attention does not look ahead: no attention mask is needed.
    ids_ST = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in rows])
    label_ST = torch.tensor([labels + [IGNORE] * (longest - len(labels)) for _, labels in rows])
    return Examples(ids_ST, label_ST)


def example(row: Instruction, tokenizer: PreTrainedTokenizerBase, form: str | None) -> tuple[list[int], list[int]]:
    """The token ids of a row, and its labels: `IGNORE` for all but the answers and the tokens that end them.

    The row is tokenised as one text, in the chat template as `apply_chat_template` does it. A token that holds the
    first letter of an answer belongs to the answer. The plain form gets one end-of-text token, which counts.
    """
    if form == "chat":
        return _labelled(chat_pieces(row, tokenizer), tokenizer, special=False)
    ids, labels = _labelled(row.plain, tokenizer, special=True)
    end = tokenizer.eos_token_id
    if ids and ids[-1] == end:
        ids.pop(), labels.pop()
    return (ids, labels) if end is None else ([*ids, int(end)], [*labels, int(end)])


def shown_row(spec: str, tokenizer: PreTrainedTokenizerBase, form: str, *, answers: bool) -> list[str]:
    """Return lines that show the first row of instruction data as text, and with `answers` what is learned of it.

    Long texts of its messages are cut in their middle; roles and special tokens are all there.

    Args:
        spec: `alpaca`, or a file of instructions.
        tokenizer: the tokenizer of the model.
        form: `chat` or `plain`.
        answers: whether the answers alone count in the loss.
    """
    row = _cut_row(read_instructions(spec)[0])
    pieces = chat_pieces(row, tokenizer) if answers and form == "chat" else row.plain
    text = chat_text(row, tokenizer) if form == "chat" else plain_text(row)
    form_words = "in the chat template" if form == "chat" else "in the plain form"
    lines = [f"{shown(spec)}, row 1 {form_words}: {_quoted(text)}"]
    if answers:
        learned = "".join(part for part, is_answer in pieces if is_answer)
        end = tokenizer.eos_token if form == "plain" else None
        more = "" if end is None or learned.endswith(str(end)) else f" and {end}"
        lines.append(f"learned of it (--completion-only): {_quoted(learned)}{more}")
    return lines


def _cut_row(row: Instruction, longest: int = 160, least: int = 24) -> Instruction:
    """A row with the texts of its messages cut, to share a length."""
    each = max(least, longest // max(1, len(row.messages)))
    messages = [{**message, "content": _cut(message["content"], each)} for message in row.messages]
    plain = [("".join(_cut(part, each) for part in _MARKS.split(text)), answer) for text, answer in row.plain]
    return Instruction(row.where, messages, plain)


def _cut(text: str, longest: int) -> str:
    """A text, cut in its middle if it is longer in one line; marks of the plain form are never cut."""
    if _MARKS.fullmatch(text) or len(_one_line(text)) <= longest:
        return text
    half = longest // 2
    while len(_one_line(text[:half] + text[-half:])) > longest and half > 1:
        half -= 1
    return f"{text[:half].rstrip()} ... {text[-half:].lstrip()}"


def _one_line(text: str) -> str:
    """A text in one line, with its line breaks as \\n."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _quoted(text: str) -> str:
    return f'"{_one_line(text)}"'


def _labelled(
    pieces: Sequence[Piece], tokenizer: PreTrainedTokenizerBase, *, special: bool
) -> tuple[list[int], list[int]]:
    """The token ids of a text in parts, and its labels: `IGNORE` for all that is not an answer."""
    text = "".join(part for part, _ in pieces)
    ends = list(accumulate(len(part) for part, _ in pieces))
    answers = [(end - len(part), end) for (part, is_answer), end in zip(pieces, ends, strict=True) if is_answer]
    if tokenizer.is_fast:
        encoded = tokenizer(text, verbose=False, add_special_tokens=special, return_offsets_mapping=True)
        ids: list[int] = list(encoded["input_ids"])
        offsets = encoded["offset_mapping"]
        counts = [any(last > begin and first < end for begin, end in answers) for first, last in offsets]
    else:
        ids = tokenize(tokenizer, text, special=special)

        def tokens_before(place: int) -> int:
            """The number of tokens that the text has before a place, as far as nothing behind it changes them."""
            if place == len(text):
                return len(ids)
            return common_length(ids, tokenize(tokenizer, text[:place], special=special))

        places = [(tokens_before(begin), tokens_before(end)) for begin, end in answers]
        counts = [any(begin <= place < end for begin, end in places) for place in range(len(ids))]
    return ids, [id if is_answer else IGNORE for id, is_answer in zip(ids, counts, strict=True)]
