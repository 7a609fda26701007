"""The calibration of a run: from its text SPEC to windows of token ids.

`text/specs.py` reads the text, `text/tokens.py` tokenises it, and `text/windows.py` draws the windows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.core.errors import UsageError
from secateur.core.names import shown
from secateur.core.progress import say
from secateur.evaluate.tasks import task_text
from secateur.models.load import Checkpoint
from secateur.prune.prepare import Prepared
from secateur.text.instructions import has_template
from secateur.text.specs import TASK, check_spec, holds_ids, read_in_template, read_text
from secateur.text.specs import prompt_form as prompt_form_of
from secateur.text.tokens import check_ids, tokenize
from secateur.text.windows import labelled_windows


def read_windows(prepared: Prepared) -> Tensor | None:
    """Return the calibration windows, token ids [S, T]; None if the method needs none."""
    return read_labelled(prepared)[0]


def draw_windows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    text: str | Path,
    *,
    samples: int = 128,
    seqlen: int | None = None,
    seed: int = 0,
    text_field: str = "text",
    prompt_form: str = "auto",
) -> Tensor:
    """Draw calibration windows for a model in memory: those that `prune` draws with the same settings.

    Args:
        model: the model, for its vocabulary and its number of positions.
        tokenizer: its tokenizer; None for a file of token ids.
        text: a text SPEC: `builtin`, `wikitext2`, `c4`, `alpaca`, a file, or `task:NAME`.
        samples, seqlen: the number of windows and their length in tokens; None is min(2048, the model's maximum).
        seed: the seed of the choice of windows.
        text_field: the field of .jsonl and .parquet rows that holds the text.
        prompt_form: how rows of instructions become text; see `Request`.

    Returns:
        Token ids, int64 [samples, seqlen]; a file of token ids is taken as it is.

    Raises:
        UsageError: an unknown text, no tokenizer although the text needs one, or a size out of range.
        SecateurError: the text is too short, or its tokens do not go with the model.
    """
    text = str(text)
    vocabulary, longest = int(model.config.vocab_size), int(model.config.max_position_embeddings)
    seqlen = min(2048, longest) if seqlen is None else seqlen
    check_spec(text)
    if samples < 1:
        raise UsageError(f"samples {samples}: at least one window is needed")
    if not 1 < seqlen <= longest:
        raise UsageError(f"seqlen {seqlen} is outside [2, {longest}], the lengths this model knows")
    if tokenizer is None and not holds_ids(text):
        raise UsageError(
            f"the text '{text}' needs a tokenizer: give AutoTokenizer.from_pretrained(...), or a file of token ids"
            " (.npy or .safetensors)"
        )
    how = {"samples": samples, "seqlen": seqlen, "seed": seed}

    def own_tokenizer() -> PreTrainedTokenizerBase:
        assert tokenizer is not None, "only a file of token ids does without"
        return tokenizer

    form = prompt_form_of(text, prompt_form, own_tokenizer, text_field)
    return _labelled(text, tokenizer, vocabulary, longest, text_field=text_field, include_path=None, form=form, **how)[
        0
    ]


def read_labelled(prepared: Prepared) -> tuple[Tensor | None, Tensor | None]:
    """Return the calibration windows, and their labels if the text is a task."""
    request, spec = prepared.request, prepared.calibration
    if spec is None:
        return None, None
    size = {"samples": prepared.samples, "seqlen": prepared.seqlen, "seed": request.seed, "form": prepared.form}
    if request.prompt_form == "auto":
        say_form(spec, prepared.form, prepared.checkpoint)
    return _labelled_of(
        prepared.checkpoint, spec, text_field=request.text_field, include_path=request.include_path, **size
    )


def say_form(spec: str, form: str | None, checkpoint: Checkpoint) -> None:
    """Say which form instructions are in, and how to have the other, where the model has a chat template."""
    if form == "chat":
        say(f"{shown(spec)}: each row goes through the model's chat template; --prompt-form plain leaves it out")
    elif form == "plain" and has_template(checkpoint.tokenizer()):
        say(f"{shown(spec)}: in the plain form, as in papers; --prompt-form chat takes the model's chat template")


def windows_of(
    checkpoint: Checkpoint,
    spec: str,
    *,
    samples: int,
    seqlen: int,
    seed: int,
    text_field: str,
    include_path: str | Path | None = None,
    form: str | None = None,
) -> Tensor:
    """Return windows, token ids [S, T], of the calibration part of a text SPEC, with the tokenizer of a model."""
    size = {"samples": samples, "seqlen": seqlen, "seed": seed, "form": form}
    return _labelled_of(checkpoint, spec, text_field=text_field, include_path=include_path, **size)[0]


def _labelled_of(
    checkpoint: Checkpoint, spec: str, *, include_path: str | Path | None = None, **how: Any
) -> tuple[Tensor, Tensor | None]:
    tokenizer = None if holds_ids(spec) else checkpoint.tokenizer()
    vocabulary, longest = checkpoint.config.vocab_size, checkpoint.max_length()
    return _labelled(spec, tokenizer, vocabulary, longest, include_path=include_path, **how)


def _labelled(
    spec: str,
    tokenizer: PreTrainedTokenizerBase | None,
    vocabulary: int,
    longest: int,
    *,
    samples: int,
    seqlen: int,
    seed: int,
    text_field: str,
    include_path: str | Path | None,
    form: str | None,
) -> tuple[Tensor, Tensor | None]:
    if spec.startswith(TASK):
        text = task_text(spec, include_path)
    elif form == "chat":
        assert tokenizer is not None, "the chat template is the tokenizer's"
        text = read_in_template(spec, tokenizer)
    else:
        text = read_text(spec, "calibration", text_field=text_field)

    def ids_of(row: str) -> list[int]:
        assert tokenizer is not None, "only a file of token ids does without"
        return tokenize(tokenizer, row, special=form != "chat")

    windows, labels = labelled_windows(text, ids_of, samples=samples, seqlen=seqlen, seed=seed)
    check_ids(windows, vocabulary, longest, spec, None if tokenizer is None else len(tokenizer))
    return windows, labels
