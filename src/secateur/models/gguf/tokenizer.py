"""Write the tokenizer of a GGUF file. transformers makes it; what it leaves out is put right here."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PreTrainedTokenizerFast

from secateur.core.errors import SecateurError, reason
from secateur.models.gguf.file import GgufFile

_BYTE_LEVEL = "gpt2"  # tokenizer.ggml.model of a byte-level vocabulary, whose split is named by tokenizer.ggml.pre
_AS_GPT2 = ("gpt-2", "phi-2", "smollm", "mpt", "olmo", "jais")  # smollm splits digits too, and has no merges of them
_LLAMA3 = ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2")
"""llama.cpp takes a word that is in the vocabulary whole, without its merges, and begins a text with BOS."""


def write_tokenizer(file: GgufFile, folder: Path, length: int) -> None:
    """Write the tokenizer of a file into the folder of its model.

    Args:
        file: the file.
        folder: the folder.
        length: the number of positions that the model knows.

    Raises:
        SecateurError: it splits text in a way that transformers does not know, or transformers cannot make it.
    """
    split = file.metadata.get("tokenizer.ggml.pre")
    byte_level = file.metadata.get("tokenizer.ggml.model") == _BYTE_LEVEL
    if byte_level and split is not None and split not in (*_AS_GPT2, *_known_splits()):
        raise SecateurError(
            f"{file.path}: its tokenizer splits text as {split!r} does, which transformers does not know, so token ids "
            f"would be wrong (known: {', '.join(sorted({*_AS_GPT2, *_known_splits()}))})"
        )
    whole = byte_level and split in _LLAMA3
    try:
        with TemporaryDirectory() as alone:  # a tokenizer.json beside the file would be taken instead
            (Path(alone) / "model.gguf").symlink_to(file.path.absolute())
            begin = whole and "tokenizer.ggml.add_bos_token" not in file.metadata
            given: dict[str, Any] = {"gguf_file": "model.gguf", **({"add_bos_token": True} if begin else {})}
            tokenizer = PreTrainedTokenizerFast.from_pretrained(alone, **given)
        tokenizer.model_max_length = length
        if whole:
            tokenizer.backend_tokenizer.model.ignore_merges = True
        tokenizer.save_pretrained(folder)
        _drop_added(folder / "tokenizer.json", file.tensors["token_embd.weight"].rows)
    except Exception as error:
        raise SecateurError(
            f"{file.path}: transformers cannot make a tokenizer from its metadata ({reason(error)})"
        ) from error


def _drop_added(saved: Path, words: int) -> None:
    """Take tokens out of a tokenizer.json whose ids the model does not have.

    transformers adds <|endoftext|> to a byte-level vocabulary without a token for unknown words.
    """
    content = json.loads(saved.read_text("utf-8"))
    kept = [token for token in content["added_tokens"] if token["id"] < words]
    if len(kept) < len(content["added_tokens"]):
        saved.write_text(json.dumps({**content, "added_tokens": kept}, ensure_ascii=False) + "\n", "utf-8")


def _known_splits() -> tuple[str, ...]:
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
    except ImportError:  # an earlier transformers
        return _LLAMA3
    return tuple(GGUF_PRE_TOKENIZER_SPLITS)
