"""What a pruned model is healed on: windows of text, or instructions with their answers.

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
from secateur.text.windows import IGNORE


@dataclass(frozen=True)
class Examples:
    """Token ids and what is to be predicted, int64 [S, T] each. `label_ST` is `ids_ST` where a token counts, and `IGNORE` elsewhere."""

    ids_ST: Tensor
    label_ST: Tensor

    @property
    def tokens(self) -> int:
        """How many tokens count; the first of an example is given, not predicted."""
        return int((self.label_ST[:, 1:] != IGNORE).sum())


def answers_alone(spec: str, tokenizer: PreTrainedTokenizerBase, *, samples: int, seqlen: int, seed: int) -> Examples:
    """Instructions with their answers, one an example, of which the answers alone count (and the end of text behind them).

    Args:
        spec: `alpaca`, or a `.json` file in Alpaca form.
        tokenizer: of the model.
        samples: how many are drawn.
        seqlen: longer ones are cut off.
        seed: of the draw.

    Raises:
        UsageError: the SPEC is no instruction data.
        SecateurError: it has fewer examples than asked for whose answer begins within `seqlen` tokens.
    """
    found = read_instructions(spec)
    rows: list[tuple[list[int], list[int]]] = []
    for number in np.random.default_rng(seed).permutation(len(found)):
        ids, given = _example(found[int(number)], tokenizer)
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
    ids_ST = torch.tensor(
        [ids + [0] * (longest - len(ids)) for ids, _ in rows]
    )  # what pads stands behind what counts, which attention does not reach
    label_ST = torch.tensor([labels + [IGNORE] * (longest - len(labels)) for _, labels in rows])
    return Examples(ids_ST, label_ST)


def _example(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], int]:
    """The tokens of a row, as those of one text, with one end of text; and how many are given: those before the first that holds something of the answer."""
    asked, text, end = alpaca_prompt({**row, "output": ""}), alpaca_prompt(dict(row)), tokenizer.eos_token_id
    encoded = tokenizer(text, verbose=False, **({"return_offsets_mapping": True} if tokenizer.is_fast else {}))
    ids: list[int] = list(encoded["input_ids"])
    if ids and ids[-1] == end:
        ids.pop()
    if tokenizer.is_fast:
        answered = (last > len(asked) for _, last in encoded["offset_mapping"][: len(ids)])
    else:
        alone = tokenizer(asked, verbose=False)["input_ids"]
        answered = (place >= len(alone) or alone[place] != id for place, id in enumerate(ids))
    given = next((place for place, here in enumerate(answered) if here), len(ids))
    return ids + ([] if end is None else [int(end)]), given
