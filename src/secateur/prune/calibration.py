"""The calibration of a run: from its text SPEC to windows of token ids.

`text/specs.py` reads the text, `text/tokens.py` tokenises it, and `text/windows.py` draws the windows.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from secateur.evaluate.tasks import task_text
from secateur.models.load import Checkpoint
from secateur.prune.prepare import Prepared
from secateur.text.specs import TASK, holds_ids, read_text
from secateur.text.tokens import check_ids, tokenize
from secateur.text.windows import labelled_windows


def read_windows(prepared: Prepared) -> Tensor | None:
    """Return the calibration windows, token ids [S, T]; None if the method needs none."""
    return read_labelled(prepared)[0]


def read_labelled(prepared: Prepared) -> tuple[Tensor | None, Tensor | None]:
    """Return the calibration windows, and their labels if the text is a task."""
    request, spec = prepared.request, prepared.calibration
    if spec is None:
        return None, None
    size = {"samples": prepared.samples, "seqlen": prepared.seqlen, "seed": request.seed}
    return _labelled_of(
        prepared.checkpoint, spec, text_field=request.text_field, include_path=request.include_path, **size
    )


def windows_of(
    checkpoint: Checkpoint,
    spec: str,
    *,
    samples: int,
    seqlen: int,
    seed: int,
    text_field: str,
    include_path: str | Path | None = None,
) -> Tensor:
    """Return windows, token ids [S, T], of the calibration part of a text SPEC, with the tokenizer of a model."""
    size = {"samples": samples, "seqlen": seqlen, "seed": seed}
    return _labelled_of(checkpoint, spec, text_field=text_field, include_path=include_path, **size)[0]


def _labelled_of(
    checkpoint: Checkpoint,
    spec: str,
    *,
    samples: int,
    seqlen: int,
    seed: int,
    text_field: str,
    include_path: str | Path | None = None,
) -> tuple[Tensor, Tensor | None]:
    tokenizer = None if holds_ids(spec) else checkpoint.tokenizer()
    text = (
        task_text(spec, include_path)
        if spec.startswith(TASK)
        else read_text(spec, "calibration", text_field=text_field)
    )

    def ids_of(row: str) -> list[int]:
        assert tokenizer is not None, "only a file of token ids does without"
        return tokenize(tokenizer, row)

    windows, labels = labelled_windows(text, ids_of, samples=samples, seqlen=seqlen, seed=seed)
    check_ids(
        windows,
        checkpoint.config.vocab_size,
        checkpoint.max_length(),
        spec,
        None if tokenizer is None else len(tokenizer),
    )
    return windows, labels
