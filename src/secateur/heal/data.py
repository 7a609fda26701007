"""The data that a pruned model is healed on: windows of text, or instructions with their answers.

Shape letters: S examples, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from secateur.core.errors import SecateurError
from secateur.text.files import alpaca_prompt
from secateur.text.specs import read_instructions
from secateur.text.tokens import tokenize
from secateur.text.windows import IGNORE


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


def answers_alone(spec: str, tokenizer: PreTrainedTokenizerBase, *, samples: int, seqlen: int, seed: int) -> Examples:
    """Read instructions with answers, one per example; only answers and the end-of-text token count in the loss.

    Args:
        spec: `alpaca`, or a `.json` file in Alpaca form.
        tokenizer: the tokenizer of the model.
        samples: the number of examples to draw.
        seqlen: the most tokens of an example; longer ones are cut off.
        seed: the seed of the draw.

    Raises:
        UsageError: the SPEC is not instruction data.
        SecateurError: fewer than `samples` examples have an answer that begins within `seqlen` tokens.
    """
    instructions = read_instructions(spec)
    rows: list[tuple[list[int], list[int]]] = []
    for number in np.random.default_rng(seed).permutation(len(instructions)):
        ids, given = _example(instructions[int(number)], tokenizer)
        if given < min(len(ids), seqlen):
            rows.append((ids[:seqlen], [IGNORE] * given + ids[given:seqlen]))
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


def _example(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], int]:
    """The tokens of a row with one end-of-text token, and the number of tokens before the answer.

    The row is tokenised as one text. A token that holds the first letter of the answer belongs to the answer.
    """
    question, text, end = alpaca_prompt({**row, "output": ""}), alpaca_prompt(dict(row)), tokenizer.eos_token_id
    encoded = tokenizer(text, verbose=False, **({"return_offsets_mapping": True} if tokenizer.is_fast else {}))
    ids: list[int] = list(encoded["input_ids"])
    if ids and ids[-1] == end:
        ids.pop()
    if tokenizer.is_fast:
        answered = (last > len(question) for _, last in encoded["offset_mapping"][: len(ids)])
    else:
        question_ids = tokenize(tokenizer, question)
        answered = (place >= len(question_ids) or question_ids[place] != id for place, id in enumerate(ids))
    given = next((place for place, is_answer in enumerate(answered) if is_answer), len(ids))
    return ids + ([] if end is None else [int(end)]), given
