"""How perplexity is measured: named protocols, which show whether numbers can be compared with those of a paper.

Every difference counts: the length of windows, how rows are joined, where BOS stands, whether the incomplete last
window counts, and how much of the text is used.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from secateur.core.errors import SecateurError, UsageError, unknown
from secateur.text.specs import NAMED, Text, holds_ids, read_text
from secateur.text.tokens import check_ids, tokenize


@dataclass(frozen=True)
class Protocol:
    """One way to measure perplexity.

    Attributes:
        name, source: its name, and who uses it.
        spec: the text.
        seqlen: tokens of a window; None is min(2048, the model's maximum), 0 the model's maximum.
        join: the text between rows.
        lines: whether a plain file is split into its lines first, as the rows of a data set.
        bos: `start`: the tokenizer's own start token once, before the whole text; `each`: before every row.
        tail: whether the incomplete last window counts.
        rows, windows, tokens: use only the first N of them; None is no limit.
    """

    name: str
    source: str
    spec: str
    seqlen: int | None = None
    join: str = "\n\n"
    lines: bool = True
    bos: Literal["start", "each"] = "start"
    tail: Literal["drop", "keep"] = "drop"
    rows: int | None = None
    windows: int | None = None
    tokens: int | None = None


PROTOCOLS = {
    p.name: p
    for p in (
        Protocol(
            "builtin",
            "secateur: held-out files of the standard library",
            "builtin",
            bos="each",
            lines=False,
            windows=128,
        ),
        Protocol("wikitext2", "WikiText-2 at min(2048, the model's maximum)", "wikitext2"),
        Protocol("slicegpt", "SliceGPT (arXiv:2401.15024): WikiText-2 at 2048", "wikitext2", 2048),
        Protocol("sparsegpt", "SparseGPT (arXiv:2301.00774): WikiText-2 at 2048", "wikitext2", 2048),
        Protocol("wanda", "Wanda (arXiv:2306.11695): WikiText-2 at the model's maximum", "wikitext2", 0),
        Protocol("llm-surgeon-opt", "LLM Surgeon (arXiv:2312.17244), OPT: WikiText-2 at 2048", "wikitext2", 2048),
        Protocol("llm-surgeon-llama", "LLM Surgeon (arXiv:2312.17244), LLaMA-2: WikiText-2 at 4096", "wikitext2", 4096),
        Protocol(
            "disp-llm",
            "DISP-LLM's code, LLaMA-2: WikiText-2 at 4096, the first 256 x 2048 tokens, tail kept",
            "wikitext2",
            4096,
            tail="keep",
            tokens=256 * 2048,
        ),
        Protocol("llm-pruner", "LLM-Pruner (arXiv:2305.11627): WikiText-2 at 128", "wikitext2", 128),
        Protocol(
            "c4",
            "C4 as SparseGPT and Wanda: 1100 validation documents, 256 windows of 2048",
            "c4",
            2048,
            join=" ",
            lines=False,
            rows=1100,
            windows=256,
        ),
        Protocol("text", "a file as it is, at min(2048, the model's maximum)", "", lines=False),
    )
}


def find_protocol(name: str | None, spec: str | None, *, bundled: bool) -> Protocol:
    """The protocol with this name, or the default one for a text; a `spec` replaces the protocol's own text."""
    if name is not None and name not in PROTOCOLS:
        raise unknown("protocol", name, PROTOCOLS)
    if name is None:
        base = (spec or ("builtin" if bundled else "wikitext2")).partition("@")[0]
        name = base if base in PROTOCOLS and base in NAMED else "text"
    protocol = replace(PROTOCOLS[name], spec=spec) if spec else PROTOCOLS[name]
    if not protocol.spec:
        raise UsageError("protocol 'text' needs a text: --text FILE")
    return protocol


def window_length(protocol: Protocol, asked: int | None, longest: int) -> int:
    """The number of tokens in a window.

    Raises:
        UsageError: the model does not take windows of this length.
    """
    default = min(2048, longest) if protocol.seqlen is None else protocol.seqlen or longest
    length = default if asked is None else asked
    if not 1 < length <= longest:
        raise UsageError(
            f"windows of {length} tokens (protocol {protocol.name}) are outside [2, {longest}], what this model knows; "
            "give --eval-seqlen"
        )
    return length


def evaluation_windows(
    protocol: Protocol, seqlen: int, tokenizer: PreTrainedTokenizerBase | None, text_field: str = "text"
) -> list[Tensor]:
    """The windows, int64 [T] each, of one length except for a kept tail. Token ids need no tokenizer.

    Raises:
        SecateurError: the text is shorter than one window.
    """
    text = read_text(protocol.spec, "evaluation", text_field=text_field)
    if text.ids is not None:
        return list(text.ids.unbind())[: protocol.windows]
    assert tokenizer is not None, "text needs a tokenizer; only token ids do without"
    stream = _stream(protocol, text, tokenizer)[: protocol.tokens]
    windows = [torch.tensor(stream[start : start + seqlen]) for start in range(0, len(stream), seqlen)]
    if windows and len(windows[-1]) < seqlen and (protocol.tail == "drop" or len(windows[-1]) < 2):
        windows.pop()
    if not windows:
        raise SecateurError(
            f"{protocol.spec}: has {len(stream):,} tokens, fewer than one window of {seqlen}; give more text, "
            "or a smaller --eval-seqlen"
        )
    return windows[: protocol.windows]


def check_limit(limit: int | None, option: str = "--limit") -> None:
    """Raise UsageError for a number of windows or items below 1."""
    if limit is not None and limit < 1:
        raise UsageError(f"{option} {limit}: at least 1 is needed; leave it out to use everything")


def checked_windows(
    protocol: Protocol,
    seqlen: int,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    vocabulary: int,
    longest: int,
    text_field: str = "text",
    limit: int | None = None,
) -> list[Tensor]:
    """The first `limit` windows, after a check that a model takes them; see `evaluation_windows`.

    Args:
        protocol, seqlen: the protocol, and the number of tokens in a window.
        tokenizer: the tokenizer; None for token ids.
        vocabulary, longest: the number of rows of the embedding of the model, and of its positions.
        text_field: the field of .jsonl and .parquet rows that holds the text.
        limit: the number of windows; None takes all.

    Raises:
        SecateurError: the text is shorter than one window, or does not go with the model.
    """
    windows = evaluation_windows(protocol, seqlen, tokenizer, text_field)[:limit]
    tokens = None if tokenizer is None or holds_ids(protocol.spec) else len(tokenizer)
    for window in windows:
        check_ids(window, vocabulary, longest, protocol.spec, tokens)
    return windows


def _stream(protocol: Protocol, text: Text, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    rows = list(text.rows)
    if protocol.lines and len(rows) == 1 and Path(text.spec).is_file():
        rows = wikitext_rows(rows[0])
    rows = rows[: protocol.rows]
    if protocol.bos == "each":
        return [i for row in rows for i in tokenize(tokenizer, row)]
    return tokenize(tokenizer, protocol.join.join(rows))


def wikitext_rows(raw: str) -> list[str]:
    """The rows of the hub's `wikitext-2-raw-v1`, from the raw file.

    A row is a line with its line break; a line of one space is an empty row.
    """
    return ["" if line == " \n" else line for line in raw.splitlines(keepends=True)]
