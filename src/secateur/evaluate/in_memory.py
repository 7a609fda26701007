"""The perplexity of a model in memory: the numbers that `evaluate` gives for the same model in a folder."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.core.device import resolve_dtype
from secateur.core.errors import UsageError
from secateur.core.records import Record
from secateur.evaluate.evaluate import protocol_facts
from secateur.evaluate.perplexity import perplexity as measure
from secateur.models.load import BUNDLED, bundled_folder, in_dtype
from secateur.plan.plan import read_plan_json
from secateur.text.protocols import check_limit, checked_windows, find_protocol, window_length
from secateur.text.specs import holds_ids


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    text: str | Path | None = None,
    protocol: str | None = None,
    seqlen: int | None = None,
    limit: int | None = None,
    text_field: str = "text",
    dtype: torch.dtype | str | None = None,
) -> Record:
    """Measure the perplexity of a model in memory, on its device. The model does not change, and nothing is written.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer; None for a file of token ids.
        text, protocol, seqlen, limit, text_field: as in `EvalRequest`.
        dtype: the dtype to compute in, or its name; None takes that of the command line: the dtype of the model, and
            float32 on a CPU for a model of 16-bit floats, which takes a copy of the model.

    Returns:
        `ppl`, `loss` (nats a token), `ppl_protocol`, `device` and `dtype`, as in the record of `evaluate`.

    Raises:
        UsageError: an unknown protocol, no tokenizer although the text needs one, or a number out of range.
        SecateurError: the text cannot be read or does not go with the model, or a loss is not finite.
    """
    check_limit(limit)
    spec = None if text is None else str(text)
    found = find_protocol(protocol, spec, bundled=_is_bundled(model))
    longest = int(model.config.max_position_embeddings)
    length = window_length(found, seqlen, longest)
    if tokenizer is None and not holds_ids(found.spec):
        raise UsageError(
            f"the text '{found.spec}' needs a tokenizer: give AutoTokenizer.from_pretrained(...), or a file of token"
            " ids (.npy or .safetensors)"
        )
    windows = checked_windows(
        found,
        length,
        tokenizer,
        vocabulary=int(model.config.vocab_size),
        longest=longest,
        text_field=text_field,
        limit=limit,
    )
    computed = in_dtype(model, resolve_dtype(dtype, model.dtype, model.device))
    modes = [(module, module.training) for module in computed.modules()]
    computed.eval()
    try:
        measured = measure(computed, windows)
    finally:
        for module, training in modes:
            module.training = training
    return {
        **measured.facts,
        "ppl_protocol": protocol_facts(found, windows),
        "device": str(model.device),
        "dtype": str(computed.dtype).removeprefix("torch."),
    }


def _is_bundled(model: PreTrainedModel) -> bool:
    """Return True for the model in the package and for what was pruned from it: their text is the built-in one."""
    name = model.config.name_or_path
    if not name or not Path(name).is_dir():
        return False
    return Path(name).samefile(bundled_folder()) or (read_plan_json(Path(name)) or {}).get("model") == BUNDLED
